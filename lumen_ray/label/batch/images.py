"""Images of the requests in a batch file: data URLs, files beside it, and files in stores. Nothing comes from the web.

The file is the user's own, as the lists of images that `label` takes, so it may name any file that the user can read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError
from lumen_ray.label.inputs import Item, Reader
from lumen_ray.wire.images import image_bytes


def image_reader(batch_file: str) -> Callable[[str, str], bytes]:
    """Reads the image of (URL, its place in the request): base64 or a data URL, ``file://`` or a path, relative to the
    batch file, or the URL of a store. Raises `UserError`."""
    return partial(_read, urls.parent(batch_file))


def _read(folder: str, url: str, place: str) -> bytes:
    url = url.strip()
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise UserError(
            f"'{place}' is a web address, which is not read; give a data URL, a path relative to the batch file, or "
            "the URL of a store such as s3://",
            "remote_image_refused",
        )
    # base64 has no dot, and the path of a picture has one before its suffix
    if scheme == "data" or (not urls.is_url(url) and scheme != "file" and "." not in url):
        return image_bytes(url, place)
    found = Reader().read(Item(place, urls.join(folder, url.removeprefix("file://"))))
    if isinstance(found, files.StoreError):
        raise found
    if isinstance(found, UserError):
        raise UserError(f"'{place}': {found}", found.reason)
    return found
