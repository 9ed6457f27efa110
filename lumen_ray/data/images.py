"""Encoded image bytes to pixels. The one place where EXIF rotation is applied and broken files are caught."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from lumen_ray.errors import UserError

MAX_PIXELS = 50_000_000
# Named, because some of Pillow's other readers start programs (EPS) or have no signature to recognise them by.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PSD")
_ORIENTATION = 0x0112  # EXIF tag
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # chunks where a PNG may keep it
_SWAPS_AXES = (5, 6, 7, 8)
_HIGH_DEPTH = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
#: what Pillow's parsers raise on damaged bytes; anything else is a bug and keeps its traceback
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, ZeroDivisionError)
_DAMAGE += (OverflowError, MemoryError, AttributeError, struct.error)


def _broken(why: str) -> UserError:
    return UserError(f"the image cannot be read ({why}); give a complete JPEG, PNG, WebP, TIFF, GIF or BMP file",
                     "broken_image")  # fmt: skip


@contextmanager
def _guarded() -> Iterator[None]:
    """Damaged bytes become one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _broken("it declares far more pixels than any limit allows") from None
    except Image.UnidentifiedImageError:
        raise _broken("its format is not recognised") from None
    except _DAMAGE as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _broken(why[:160]) from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The file's header; refuses an empty file and one that declares more than `max_pixels`."""
    if not data:
        raise _broken("the file is empty")
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    width, height = image.size
    if width <= 0 or height <= 0:
        raise _broken("it has no pixels")
    if width * height > max_pixels:
        raise UserError(
            f"the image declares {width}x{height} pixels, more than the limit of {max_pixels}; give a smaller one",
            "broken_image",
        )
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation 1..8; 1 where the tag is absent, unreadable or out of range."""
    if image.format == "PNG" and not any(word in data for word in _PNG_EXIF):
        return 1  # Pillow would decode all pixels to look for a block behind them
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:  # a damaged EXIF block does not make the pixels unreadable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit and float are scaled, transparency is composited on white."""
    if image.mode in _HIGH_DEPTH:
        values = np.asarray(image).astype(np.float64)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        # 16-bit files use the whole 16-bit range by definition; 32-bit and float files declare none: their own is used
        if image.mode.startswith("I;16") or (image.mode == "I" and values.min() >= 0 and values.max() <= 65535):
            values = values / 257.0
        elif np.ptp(values) > 0:
            values = (values - values.min()) * (255.0 / np.ptp(values))
        return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded bytes of an image (first frame of an animation) to uint8 [H, W, 3] RGB in the EXIF-rotated frame.

    Raises `UserError(reason="broken_image")` for what cannot be read: unknown formats, truncated or damaged files,
    and files that declare more than `max_pixels` (before any pixel is decoded).
    """
    with _guarded():
        image = _open(data, max_pixels)
        image.load()
        orientation = _orientation(image, data)  # only now: Pillow rotates TIFF files itself, and drops the tag
        width, height = image.size  # an icon or damaged header may change it on load
        if width * height > max_pixels:
            raise _broken(f"it unpacks to {width}x{height} pixels, more than the limit of {max_pixels}")
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        return np.array(_to_rgb(image))


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in the EXIF-rotated frame, from the header alone. Raises like `decode`."""
    with _guarded():
        image = _open(data, max_pixels)
        width, height = image.size
        if image.format != "TIFF" and _orientation(image, data) in _SWAPS_AXES:  # a TIFF's size is rotated already
            return width, height
        return height, width
