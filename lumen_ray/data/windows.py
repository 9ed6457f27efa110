"""Tiled TIFF files that are too large to be decoded at once, read window by window.

`tifffile` (the `tiff` extra) finds the tiles and decodes each by itself; `imagecodecs`, of the same extra, has the
codecs of most files. Files whose pixels need more than that (palettes, 16 bits, planes, rotation) are not read so.
"""

from __future__ import annotations

import io
import lzma
import math
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from PIL import Image, TiffImagePlugin

from lumen_ray.data.images import DAMAGE, MAX_PIXELS, Picture, to_rgb
from lumen_ray.errors import UserError
from lumen_ray.structures import Size


@cache
def _tifffile() -> Any:
    """The library, imported by the process that first meets a TIFF file; None where it is not installed."""
    try:
        import tifffile
    except ImportError:
        return None
    return tifffile


#: run lengths of masks are 32 bits wide
MOST_PIXELS = 2**32 - 1
#: bytes of decoded tiles that are kept, since windows that follow each other share some
_KEPT_BYTES = 64 << 20
#: raised by tifffile, its codecs and Pillow on damaged bytes
_DAMAGE = (*DAMAGE, RuntimeError, zlib.error, lzma.LZMAError)  # TiffFileError is a ValueError
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _EXTRA_UNASSOCIATED_ALPHA = 274, 2
_GREY, _RGB, _YCBCR = 1, 2, 6  # photometric interpretations
_JPEG = 7  # compression
#: none, LZW, JPEG, Deflate, PackBits, Deflate by its old number, Zstandard
_COMPRESSIONS = (1, 5, _JPEG, 8, 32773, 32946, 50000)
_MISSING_CODEC = "install lumen-ray[tiff], which has the codecs of tiled TIFF files"


class Windows(Protocol):
    """An image of (height, width) `size` that is read in parts."""

    @property
    def size(self) -> Size: ...

    def read(self, window: tuple[int, int, int, int]) -> np.ndarray:
        """The pixels of a window (x1, y1, x2, y2) in the image, uint8 [y2 - y1, x2 - x1, 3] RGB."""

    def overview(self, min_side: int) -> Picture:
        """The whole image, reduced as far as its longer side keeps `min_side` pixels."""


@dataclass(frozen=True)
class LargeImage:
    """A tiled TIFF of (height, width) `size` that is read by window. `source`: path of a local file, or its bytes."""

    source: str | bytes
    size: Size

    @contextmanager
    def open(self) -> Iterator[TiffWindows]:
        """The windows. Raises `UserError` (`broken_image`) if the file is gone or damaged."""
        with _guarded():
            opened = _tifffile().TiffFile(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)
        with opened as file:
            with _guarded():
                windows = TiffWindows(file)
            yield windows


def find_large(source: str | bytes, max_pixels: int = MAX_PIXELS) -> LargeImage | None:
    """A tiled TIFF with more than `max_pixels` that can be read by window; None for all other images.

    source: path of a local file, or its bytes. Raises `UserError` (`broken_image`) for one that only lacks the
    libraries of the `tiff` extra, and for one of more than `MOST_PIXELS`.
    """
    try:
        if _head(source) not in _MAGIC:
            return None
        if (tifffile := _tifffile()) is None:
            _check_needless(source, max_pixels)
            return None
        with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            page = file.pages[0]
            size = (page.imagelength, page.imagewidth)
            if size[0] * size[1] <= max_pixels or not _is_readable(page):
                return None
    except UserError:
        raise
    except _DAMAGE:
        return None  # whoever decodes it says what is wrong
    if size[0] * size[1] > MOST_PIXELS:
        raise _broken(f"{size[1]}x{size[0]} pixels are more than the {MOST_PIXELS} that masks can count")
    return LargeImage(source, size)


def _head(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with open(source, "rb") as file:
        return file.read(4)


def _check_needless(source: str | bytes, max_pixels: int) -> None:
    """Raises `UserError` for a file that is too large to be read without `tifffile`."""
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as opened:
        width, height = TiffImagePlugin.TiffImageFile(opened).size
    if width * height > max_pixels:
        raise _broken(f"its {width}x{height} pixels are more than are decoded at once; {_MISSING_CODEC}")


def _broken(why: str) -> UserError:
    return UserError(f"the TIFF file cannot be read: {why}", "broken_image")


@contextmanager
def _guarded() -> Iterator[None]:
    """Turns errors of damaged files and missing codecs into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _broken(_MISSING_CODEC if "imagecodecs" in text else text[:160]) from None


def _is_readable(page: Any) -> bool:
    """Whether the tiles of a page are 8-bit grey, RGB or RGBA pixels as they are shown."""
    photometric, samples, extra = int(page.photometric), page.samplesperpixel, tuple(map(int, page.extrasamples))
    kind = (photometric, samples, extra)
    colors = [(_GREY, 1, ()), (_RGB, 3, ()), (_RGB, 4, (_EXTRA_UNASSOCIATED_ALPHA,))]
    colors += [(_YCBCR, 3, ())] * (int(page.compression) == _JPEG)
    orientation = page.tags.get(_ORIENTATION)
    return (
        page.is_tiled
        and page.imagedepth == 1
        and page.dtype == np.uint8
        and page.bitspersample == 8
        and int(page.planarconfig) == 1
        and int(page.fillorder) == 1
        and int(page.compression) in _COMPRESSIONS
        and kind in colors
        and (orientation is None or orientation.value == 1)
    )


class TiffWindows:
    """`Windows` of an open tiled TIFF, of its first page; `_is_readable` holds for it."""

    def __init__(self, file: Any):
        self._level = _Level(file.pages[0])
        self._smaller = _pyramid(file, self._level)
        self.size = self._level.size

    def read(self, window: tuple[int, int, int, int]) -> np.ndarray:
        """See `Windows`. Raises `UserError` (`broken_image`) for damaged tiles."""
        return self._level.read(window)

    def overview(self, min_side: int) -> Picture:
        """See `Windows`: the smallest level of the pyramid that is large enough, or without one all tiles in turn; by
        the mean of blocks."""
        level, factor = next(
            ((level, factor) for level, factor in self._smaller if max(level.size) >= min_side), (self._level, 1)
        )
        block = max(1, max(level.size) // min_side)
        reduction = factor * block
        height, width = (-(-side // reduction) for side in self.size)
        pixels = level.reduced(block)
        # a level may lack the last row or column, where the sides are no multiples
        missing = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)]
        return Picture(np.pad(pixels, missing, mode="edge"), self.size, reduction)


def _pyramid(file: Any, full: _Level) -> list[tuple[_Level, int]]:
    """The smaller levels of the first page that can be read, with how many times they are smaller; smallest first."""
    try:
        levels = [level.keyframe for level in file.series[0].levels]
    except _DAMAGE:
        return []
    found = []
    for page in levels[1:] if levels and levels[0].offset == file.pages[0].offset else []:
        factor = round(full.size[0] / page.imagelength)
        sides = zip((page.imagelength, page.imagewidth), full.size, strict=True)
        fits = factor > 1 and all(small in (side // factor, -(-side // factor)) for small, side in sides)
        if fits and _is_readable(page):
            found.append((_Level(page), factor))
    return sorted(found, key=lambda pair: -pair[1])


class _Level:
    """The pixels of one page, of (height, width) `size`."""

    def __init__(self, page: Any):
        self._page = page
        self.size: Size = (page.imagelength, page.imagewidth)
        self._side: Size = (page.tilelength, page.tilewidth)
        self._across = math.ceil(self.size[1] / self._side[1])
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._most = max(1, _KEPT_BYTES // (3 * self._side[0] * self._side[1]))
        self._options: dict[str, Any] = {}
        if int(page.compression) == _JPEG:
            self._options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}

    def read(self, window: tuple[int, int, int, int]) -> np.ndarray:
        """The pixels of (x1, y1, x2, y2), uint8 [y2 - y1, x2 - x1, 3]."""
        x1, y1, x2, y2 = window
        out = np.empty((y2 - y1, x2 - x1, 3), np.uint8)
        height, width = self._side
        for row in range(y1 // height, -(-y2 // height)):
            for column in range(x1 // width, -(-x2 // width)):
                tile, top, left = self._tile(row, column), row * height, column * width
                ys, xs = _overlap(y1, y2, top, tile.shape[0]), _overlap(x1, x2, left, tile.shape[1])
                part = tile[ys[0] - top : ys[1] - top, xs[0] - left : xs[1] - left]
                out[ys[0] - y1 : ys[1] - y1, xs[0] - x1 : xs[1] - x1] = part
        return out

    def reduced(self, block: int) -> np.ndarray:
        """The means of `block` x `block` pixels, fewer at the far edges: uint8 [ceil(h / block), ceil(w / block),
        3]."""
        if block == 1:
            return self.read((0, 0, self.size[1], self.size[0]))
        height, width = (-(-side // block) for side in self.size)
        sums = np.zeros((height, width, 3), np.uint64)
        for row in range(math.ceil(self.size[0] / self._side[0])):
            for column in range(self._across):
                tile, top, left = self._tile(row, column), row * self._side[0], column * self._side[1]
                down, across = _starts(top, tile.shape[0], block), _starts(left, tile.shape[1], block)
                by_row = np.add.reduceat(tile.reshape(len(tile), -1), down, axis=0, dtype=np.uint32)
                by_block = np.add.reduceat(by_row.reshape(len(down), -1, 3), across, axis=1, dtype=np.uint64)
                y, x = top // block, left // block
                sums[y : y + by_block.shape[0], x : x + by_block.shape[1]] += by_block
        counts = [np.minimum(block, side - block * np.arange(-(-side // block))) for side in self.size]
        number = np.outer(*counts)[..., None].astype(np.uint64)
        return ((sums + number // 2) // number).astype(np.uint8)

    def _tile(self, row: int, column: int) -> np.ndarray:
        """A tile within the image, uint8 [h, w, 3] RGB."""
        index = row * self._across + column
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        height, width = (
            min(side, length - start * side)
            for side, length, start in zip(self._side, self.size, (row, column), strict=True)
        )
        with _guarded():
            tile = self._kept[index] = self._decoded(index)[:height, :width]
            if tile.shape != (height, width, 3):
                raise _broken(f"tile {index} has {tile.shape[1]}x{tile.shape[0]} pixels, not {width}x{height}")
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return tile

    def _decoded(self, index: int) -> np.ndarray:
        """A tile as it is stored, which may extend beyond the image; black if the file leaves it out."""
        page = self._page
        file, number = page.parent.filehandle, page.databytecounts[index]
        data = None
        if number:
            file.seek(page.dataoffsets[index])
            data = file.read(number)
        found = page.decode(data, index, _fullsize=True, **self._options)[0]
        if found is None:
            return np.zeros((*self._side, 3), np.uint8)
        pixels = found[0]
        if pixels.shape[2] == 3:
            return pixels
        return np.asarray(to_rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)))


def _overlap(start: int, end: int, first: int, length: int) -> tuple[int, int]:
    return max(start, first), min(end, first + length)


def _starts(first: int, length: int, block: int) -> np.ndarray:
    """Where in a tile, whose first pixel is number `first`, a block begins; the first one at 0."""
    return np.unique(np.concatenate([[0], np.arange(-first % block, length, block)])).astype(np.intp)
