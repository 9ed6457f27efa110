"""The files of a gallery, written as its images come: memory does not grow with their number.

    gallery.html               constant: loads the rest
    gallery/meta.js            tasks, classes, colours, counts
    gallery/index/00000.js     `INDEX_IMAGES` images each: what filters and orders need
    gallery/00000/00.js        what was found in `CHUNK` images, JSON
    gallery/00000/0017.jpg     thumbnails, `FOLDER` images to a folder

Thumbnails are a file each: in any order and under any filter the page loads the images that it shows and no others,
the browser keeps as many in memory as it likes, and a folder of a thousand files is quick on network drives too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHUNK = 32
FOLDER = 1024
INDEX_IMAGES = 8192
_FOLDER_OF_PAGE = Path(__file__).parent / "page"
#: the constant page
FRONT_PAGE = _FOLDER_OF_PAGE / "gallery.html"


class GalleryFiles:
    """Writes the folder of a gallery; images get numbers from 0 in the order in which they are added."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunk: list[dict[str, Any]] = []
        self._index = bytearray()
        (folder / "index").mkdir()
        self.images = 0

    def thumbnail(self, number: int) -> Path:
        """Where the thumbnail of an image belongs."""
        return self._images_folder(number) / f"{number % FOLDER:04d}.jpg"

    def add(self, entry: dict[str, Any], index: bytes) -> None:
        """Adds the next image: what the page shows of it, and its part of the index, by `index_entry`."""
        self._chunk.append(entry)
        self._index += index
        self.images += 1
        if self.images % CHUNK == 0:
            self._write_chunk()
        if self.images % INDEX_IMAGES == 0:
            self._write_index()

    def close(self, meta: dict[str, Any]) -> None:
        """Writes what is left, ``meta.js`` and the files of the page."""
        if self._chunk:
            self._write_chunk()
        if self.images % INDEX_IMAGES:
            self._write_index()
        sizes = {"images": self.images, "chunk": CHUNK, "folder": FOLDER, "indexImages": INDEX_IMAGES}
        _write_call(self._folder / "meta.js", "meta", {**sizes, **meta})
        for path in sorted(_FOLDER_OF_PAGE.iterdir()):
            if path.suffix in (".css", ".js"):
                (self._folder / path.name).write_bytes(path.read_bytes())

    def _write_chunk(self) -> None:
        number = (self.images - 1) // CHUNK
        folder = self._images_folder(number * CHUNK)
        _write_call(folder / f"{number % (FOLDER // CHUNK):02d}.js", "chunk", number, self._chunk)
        self._chunk = []

    def _write_index(self) -> None:
        number = (self.images - 1) // INDEX_IMAGES
        code = base64.b64encode(self._index).decode()
        _write_call(self._folder / "index" / f"{number:05d}.js", "index", number, code)
        self._index = bytearray()

    def _images_folder(self, number: int) -> Path:
        folder = self._folder / f"{number // FOLDER:05d}"
        folder.mkdir(exist_ok=True)
        return folder


def _write_call(path: Path, function: str, *arguments: Any) -> None:
    """Writes a script that hands JSON to the page."""
    code = ",".join(json.dumps(argument, separators=(",", ":")) for argument in arguments)
    path.write_text(f"gallery.{function}({code})\n", encoding="utf-8")


def index_entry(groups: Iterable[tuple[int, Sequence[float]]], texts: Iterable[tuple[int, int]], failed: bool) -> bytes:
    """One image in the index. Numbers are LEB128 varints:

        2 * number of groups + (1 if the image failed), then per group: key, count, `count` bytes of scores

    groups: (key, scores in 0..1) of the instances of a task and class; texts: (key, number) of a task's text answers,
    which have no scores. A key is ``(class + 1) * number of tasks + task``, of texts the task alone. A score is cut to
    whole hundredths of the thousandths that the page has, so that a threshold in hundredths tells exactly.
    """
    found = [(key, len(scores), bytes(thousandths(score) // 10 for score in scores)) for key, scores in groups]
    found += [(key, number, b"") for key, number in texts]
    code = varint(2 * len(found) + failed)
    for key, number, scores in found:
        code += varint(key) + varint(number) + scores
    return code


def thousandths(score: float) -> int:
    """A score in 0..1 in thousandths, rounded."""
    return min(max(round(1000 * score), 0), 1000)


def varint(number: int) -> bytes:
    """LEB128: seven bits a byte, low ones first, the high bit set in all but the last."""
    code = bytearray()
    while number > 0x7F:
        code.append(number & 0x7F | 0x80)
        number >>= 7
    code.append(number)
    return bytes(code)
