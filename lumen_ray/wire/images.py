"""Images and masks from HTTP bodies, checked before anything large is allocated; nothing is fetched here."""

from __future__ import annotations

import base64
import binascii
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lumen_ray.data.images import Picture, decode_reduced, image_size
from lumen_ray.errors import UserError

T = TypeVar("T")

#: an image of a request: its encoded bytes, or its web address, of which `serve.remote_images` makes them
GivenImage = bytes | str
#: describes the text that an image is given by
IMAGE_URL = "a data URL, base64, or a web address of a host that the server's settings allow, by default none"

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WEB = re.compile(r"^https?://", re.IGNORECASE)
_DATA_URL = re.compile(r"^data:image/[\w.+-]+;base64,", re.IGNORECASE)


def image_bytes(text: str, field: str = "image") -> bytes:
    """The encoded image in a base64 string or a `data:image/...;base64,` URL. Raises `UserError` for remote URLs.

    `field`: the place in the request, for errors.
    """
    text = text.strip()
    if not text:
        raise UserError(f"'{field}' is empty; give a base64-encoded image or a data URL", "missing_image")
    if _SCHEME.match(text):
        raise UserError(
            "remote image URLs are not fetched; send the image itself, as base64 or as a data URL",
            "remote_image_refused",
        )
    if text[:5].lower() == "data:":
        match = _DATA_URL.match(text)
        if not match:
            raise UserError("an image data URL must start like 'data:image/png;base64,'", "invalid_base64")
        text = text[match.end() :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(
            f"'{field}' is not valid base64; send the encoded file's bytes in base64", "invalid_base64"
        ) from None


def given_image(text: str, field: str = "image") -> GivenImage:
    """The web address (http, https) in a text, else as `image_bytes`."""
    return web_address(text) or image_bytes(text, field)


def web_address(text: str) -> str | None:
    """The address if a text is one of http or https, else None."""
    text = text.strip()
    return text if _WEB.match(text) else None


def check_sizes(encoded: Sequence[bytes], max_pixels: int, places: Sequence[str] = ()) -> None:
    """Checks the sizes in the headers of images. `max_pixels`: of all; `places`: where each image is in the request,
    for errors.

    Raises `UserError` with reason ``image_too_large`` or ``broken_image``.
    """
    sizes = [_named(image_size, data, sys.maxsize, places[n : n + 1]) for n, data in enumerate(encoded)]
    if (total := sum(height * width for height, width in sizes)) > max_pixels:
        height, width = sizes[0]
        what = f"the image is {width}x{height}," if len(sizes) == 1 else f"the images have {total} pixels together,"
        them = "it" if len(sizes) == 1 else "them"
        raise UserError(f"{what} more than the {max_pixels} pixels allowed; scale {them} down", "image_too_large")


def decode_images(
    encoded: Sequence[bytes], max_pixels: int, places: Sequence[str] = (), largest_side: int | None = None
) -> list[Picture]:
    """Decodes images after `check_sizes`, whose arguments and errors it shares, at a reduced scale where that leaves
    the longer side `largest_side` pixels."""
    check_sizes(encoded, max_pixels, places)

    def read(data: bytes, most: int) -> Picture:
        return decode_reduced(data, largest_side, most)

    return [_named(read, data, max_pixels, places[n : n + 1]) for n, data in enumerate(encoded)]


def _named(read: Callable[[bytes, int], T], data: bytes, max_pixels: int, place: Sequence[str]) -> T:
    """What `read` makes of an image; its errors name the `place`, if there is one."""
    try:
        return read(data, max_pixels)
    except UserError as error:
        raise UserError(f"'{place[0]}': {error}", error.reason) if place else error from None


def checked_rle(mask: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A mask prompt as a COCO RLE that is safe for pycocotools, whose C code trusts its input.

    `mask`: ``{"size": [height, width], "counts": str | list of int}``, runs in column-major order starting with
    background. `size`: (height, width) of the image. Raises `UserError` if the mask does not fit that image.
    """
    if not isinstance(mask, dict) or set(mask) != {"size", "counts"}:
        raise UserError("a mask region is {'size': [height, width], 'counts': COCO run lengths}", "invalid_region")
    if mask["size"] != list(size):
        raise UserError(
            f"the mask region is {mask['size']} but the image is {list(size)} (height, width)", "invalid_region"
        )
    counts = mask["counts"]
    runs = _runs_of(counts) if isinstance(counts, str) else counts
    valid = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not valid or not isinstance(runs, list) or sum(runs) != size[0] * size[1]:
        raise UserError(
            f"the mask region's counts must add up to the image's {size[0] * size[1]} pixels", "invalid_region"
        )
    if not any(runs[1::2]):
        raise UserError("the mask region is empty; mark at least one pixel", "invalid_region")
    return {"size": list(size), "counts": counts if isinstance(counts, str) else _compress(runs)}


def _runs_of(counts: str) -> list[int] | None:
    """Run lengths of COCO's compressed string, None if it is not one.

    Each character holds 5 bits and a sixth for 'more follows'; the sign is in the last. From the third run on, a value
    is the difference to the run two before.
    """
    if not counts.isascii():
        return None
    runs: list[int] = []
    value = shift = 0
    for char in counts.encode():
        code = char - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if shift == 0 else None


def _compress(runs: list[int]) -> str:
    """Inverse of `_runs_of`."""
    out = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            code = value & 31
            value >>= 5
            more = value != -1 if code & 16 else value != 0
            out.append((code | 32 if more else code) + 48)
    return out.decode()
