"""Decodes image files. The one place where EXIF rotation is applied and broken files are detected.

JPEG files can be decoded at a half, a quarter or an eighth of their size, which skips most of the work. `simplejpeg`
(the `speed` extra) is faster than Pillow and used if installed: both are libjpeg-turbo, with equal pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lumen_ray.errors import UserError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Pillow's warnings about damaged files do not name the file; what cannot be read is an error, which does.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

MAX_PIXELS = 50_000_000
# An allow-list, since some of Pillow's other readers start programs (EPS) or have no signature to recognise.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PSD")
_JPEG = ("JPEG", "MPO")
_SMALL = 8  # below it, several of the library's scales give the same size
_ORIENTATION = 0x0112  # EXIF tag
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # chunks of a PNG that may contain it
_SWAPS_AXES = (5, 6, 7, 8)
_HIGH_DEPTH = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
#: raised by Pillow's parsers on damaged bytes; anything else is a bug and keeps its traceback
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, ZeroDivisionError,
           OverflowError, MemoryError, AttributeError, struct.error)  # fmt: skip


def _broken(why: str) -> UserError:
    return UserError(f"the image cannot be read ({why}); give a complete JPEG, PNG, WebP, TIFF, GIF or BMP file",
                     "broken_image")  # fmt: skip


@contextmanager
def _guarded() -> Iterator[None]:
    """Turns errors of damaged bytes into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _broken("it declares far more pixels than any limit allows") from None
    except Image.UnidentifiedImageError:
        raise _broken("its format is not recognised") from None
    except DAMAGE as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _broken(why[:160]) from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header. Raises `UserError` if the file is empty or declares more than `max_pixels`."""
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
    """EXIF orientation 1..8; 1 if the tag is absent, unreadable or out of range."""
    if image.format == "PNG" and not any(word in data for word in _PNG_EXIF):
        return 1  # Pillow would decode all pixels to search for a chunk after them
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except DAMAGE:  # a damaged EXIF block does not make the pixels unreadable
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: 16-bit and float are scaled, transparency is composited on white."""
    if image.mode in _HIGH_DEPTH:
        values = np.asarray(image).astype(np.float64)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        # 16-bit files use the whole 16-bit range by definition; 32-bit and float files declare none: it is stretched
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


@dataclass(frozen=True)
class Picture:
    """An image that may have been decoded at reduced scale.

    `pixels`: uint8 [h, w, 3] RGB; `size`: (height, width) of the stored image, EXIF-rotated, in which all coordinates
    are given; a point (x, y) of it is at (x / reduction, y / reduction) of `pixels`.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    reduction: int = 1


def as_picture(image: np.ndarray | Picture) -> Picture:
    """The image as a `Picture`, at full scale if it is an array uint8 [h, w, 3]."""
    return image if isinstance(image, Picture) else Picture(image, image.shape[:2])


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image (first frame of an animation) to uint8 [H, W, 3] RGB in the EXIF-rotated frame.

    Raises `UserError(reason="broken_image")` for unknown formats, truncated or damaged files, and files that declare
    more than `max_pixels` (before any pixel is decoded).
    """
    return decode_reduced(data, None, max_pixels).pixels


def decode_reduced(data: bytes, min_side: int | None, max_pixels: int = MAX_PIXELS) -> Picture:
    """Like `decode`, but a JPEG whose longer side is at least twice `min_side` pixels is decoded at a fraction of its
    size.

    The longer side of the result has at least `min_side` pixels, if that of the stored image has.
    """
    with _guarded():
        image = _open(data, max_pixels)
        width, height = image.size
        reduction = 1
        if image.format in _JPEG:  # its EXIF block lies in the header
            orientation = _orientation(image, data)
            reduction = _reduction(width, height, min_side or max(width, height), exact=orientation in _TRANSPOSE)
            pixels = _decode_jpeg(data, image, reduction)
        else:
            image.load()
            orientation = _orientation(image, data)  # only now: Pillow rotates TIFF files itself, and drops the tag
            width, height = image.size  # an icon or damaged header may change it on load
            if width * height > max_pixels:
                raise _broken(f"it unpacks to {width}x{height} pixels, more than the limit of {max_pixels}")
            pixels = np.array(to_rgb(image))
        if orientation in _TRANSPOSE:
            pixels = np.array(Image.fromarray(pixels).transpose(_TRANSPOSE[orientation]))
        size = (width, height) if orientation in _SWAPS_AXES else (height, width)
        return Picture(pixels, size, reduction)


def _reduction(width: int, height: int, min_side: int, exact: bool) -> int:
    """The largest of 8, 4, 2, 1 that leaves the longer side at least `min_side` pixels.

    `exact`: only one that divides both sides. With others, the last row and column extend beyond the image, so that
    mirroring would shift it by a fraction of a pixel.
    """
    for factor in (8, 4, 2):
        large = max(width, height) >= min_side * factor and min(width, height) >= _SMALL * factor
        if large and not (exact and (width % factor or height % factor)):
            return factor
    return 1


def _decode_jpeg(data: bytes, image: Image.Image, reduction: int) -> np.ndarray:
    """uint8 [ceil(H / reduction), ceil(W / reduction), 3] RGB, not rotated. `image`: the file as opened by Pillow."""
    width, height = (-(-side // reduction) for side in image.size)
    if simplejpeg is not None and image.mode in ("L", "RGB") and min(width, height) >= _SMALL:
        try:
            pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=1)
        except DAMAGE:  # simplejpeg rejects files that Pillow reads with a warning, so Pillow decides
            pass
        else:
            if pixels.shape == (height, width, 3):
                return pixels
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    image.load()
    if image.size != (width, height):
        raise _broken(f"its header says {width}x{height} pixels, its data {image.width}x{image.height}")
    return np.array(to_rgb(image))


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the EXIF-rotated image, from the header alone. Raises like `decode`."""
    with _guarded():
        image = _open(data, max_pixels)
        width, height = image.size
        if image.format != "TIFF" and _orientation(image, data) in _SWAPS_AXES:  # Pillow rotates a TIFF's size itself
            return width, height
        return height, width


def orientation(data: bytes) -> int:
    """The EXIF orientation 1..8 that `decode` applies; 1 for a TIFF, which Pillow rotates itself. Raises like it."""
    with _guarded():
        image = _open(data, MAX_PIXELS)
        return 1 if image.format == "TIFF" else _orientation(image, data)


def decode_labels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a label image (palette or single channel) to its raw values, int64 [H, W], without the palette's colours.

    Label images are written by programs and have no EXIF rotation. Raises like `decode`, also for colour images.
    """
    values = decode_ids(data, max_pixels)[0]
    if values.shape[2] != 1:
        raise UserError(
            f"a label image must have one channel of numbers, not {values.shape[2]} of colours", "broken_image"
        )
    return values[..., 0]


def decode_ids(data: bytes, max_pixels: int = MAX_PIXELS) -> list[np.ndarray]:
    """The readings of an image whose values are numbers: int64 [H, W, C] as stored, without scaling, alpha or EXIF.

    A palette image has two: its indices (C = 1), and its colours (C = 3). Raises like `decode`, also for colours of 16
    bits per channel, of which Pillow drops the lower 8.
    """
    with _guarded():
        image = _open(data, max_pixels)
        image.load()
        deep = image.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6)  # bit depth and colour type in IHDR
        if deep or image.mode not in _COUNTED:
            raise UserError(
                f"an image of numbers must have whole numbers in one channel or in 8-bit colours, not mode {image.mode}"
                f"{' of 16 bits per channel' if deep else ''}",
                "broken_image",
            )
        if image.mode == "P":
            return [_as_ids(image), _as_ids(image.convert("RGB"))]
        values = _as_ids(image)
        if image.format == "PNG" and image.mode == "L" and data[24] in (2, 4):
            values //= 255 // (2 ** data[24] - 1)  # Pillow stretches 2 and 4 bits to 8
        return [values[..., :-1] if image.mode in ("LA", "RGBA") else values]


_COUNTED = ("1", "L", "LA", "P", "I", "I;16", "RGB", "RGBA")


def _as_ids(image: Image.Image) -> np.ndarray:
    values = np.array(image).astype(np.int64)
    return values.reshape(*values.shape[:2], -1)
