"""COCO run-length masks of annotations and requests, validated before they reach pycocotools' C code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pycocotools import mask as coco_mask

from lumen_ray.data.values import numbers, whole
from lumen_ray.errors import UserError

Rle = dict[str, Any]  # {"size": [height, width], "counts": str}
_FAR = 10  # a polygon may leave the image, but not by more than this many image sides


def _invalid(message: str) -> UserError:
    return UserError(message, "invalid_mask")


def runs(counts: str) -> list[int]:
    """Run lengths (background first, column by column) of a compressed COCO string.

    Each length is coded as the difference to the one two before, in groups of 5 bits with a continuation bit, offset
    by the character '0'. Raises `UserError(reason="invalid_mask")` if the string is not such a code.
    """
    lengths: list[int] = []
    value = shift = 0
    for char in counts:
        code = ord(char) - 48
        if not 0 <= code < 64 or shift > 35:
            raise _invalid(f"mask counts contain {char!r}, which is not a COCO run-length code")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        value = shift = 0
    if shift:
        raise _invalid("mask counts end in the middle of a run; give the complete COCO run-length string")
    return lengths


def check_rle(rle: Any, size: tuple[int, int]) -> Rle:
    """A compressed or uncompressed RLE as ``{"size": [height, width], "counts": str}`` for an image of `size`.

    A compressed counts string is returned unchanged. Raises `UserError(reason="invalid_mask")` if the RLE is of another
    size or its runs do not cover the image exactly.
    """
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        raise _invalid('a mask needs the keys "size" [height, width] and "counts"')
    height, width = size
    if not isinstance(rle["size"], list | tuple) or [whole(side) for side in rle["size"]] != [height, width]:
        raise _invalid(f"the mask has size {rle['size']} but the image [{height}, {width}] (height, width)")
    counts = rle["counts"].decode("ascii", "replace") if isinstance(rle["counts"], bytes) else rle["counts"]
    if isinstance(counts, str):
        lengths = runs(counts)
    elif isinstance(counts, list) and None not in (found := [whole(n) for n in counts]):
        counts = lengths = [n for n in found if n is not None]
    else:
        raise _invalid("mask counts must be a COCO run-length string or a list of whole numbers")
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise _invalid(f"the mask's runs cover {sum(lengths)} pixels, the image has {height * width}")
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode()
    return {"size": [int(height), int(width)], "counts": counts}


def from_polygon(polygon: Any, size: tuple[int, int]) -> Rle:
    """A polygon (a flat list x, y, x, y, ... in pixels, or a list of pairs) as an RLE for an image of `size`.

    Rasterised as by pycocotools. Raises `UserError(reason="invalid_mask")` if it is no polygon or lies far outside.
    """
    points = numbers(polygon)
    if points is None and isinstance(polygon, list | tuple):
        pairs = [numbers(pair) for pair in polygon]
        if all(pair is not None and len(pair) == 2 for pair in pairs):
            points = [c for pair in pairs for c in pair or ()]
    if points is None:
        raise _invalid("a polygon must be a flat list of numbers x, y, x, y, ...")
    if len(points) < 6 or len(points) % 2:
        raise _invalid(f"a polygon needs at least 3 points, x and y each, got {len(points)} numbers")
    limit = (_FAR + 1) * max(size)
    if not all(abs(c) <= limit for c in points):
        raise _invalid("a polygon lies far outside the image")
    counts = coco_mask.frPyObjects([points], *size)[0]["counts"]
    return {"size": [int(s) for s in size], "counts": counts.decode()}


def merge(masks: Sequence[Rle]) -> Rle:
    """The union of masks of one size."""
    merged = coco_mask.merge(list(masks))
    return {"size": list(masks[0]["size"]), "counts": merged["counts"].decode()}


def area(rle: Rle) -> int:
    """Number of pixels of the mask."""
    return int(coco_mask.area(rle))


def tight_xywh(rle: Rle) -> list[float]:
    """The tight box of the mask, COCO's (x, y, width, height) in pixels."""
    return [float(c) for c in coco_mask.toBbox(rle)]
