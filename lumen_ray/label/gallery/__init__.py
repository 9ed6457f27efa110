"""The gallery of a labelled folder: a static page over any number of images, opened from disk, without a server.

``gallery.html`` is a constant page that loads everything from the folder ``gallery/`` beside it: style, scripts,
``meta.js``, the index and, in folders of `layout.FOLDER` images, thumbnails and what was found in them. Data are
scripts that call the page, since a page on ``file://`` may load scripts and images but not fetch files.
"""
