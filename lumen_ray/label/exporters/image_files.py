"""Image files of an export: linked, copied, or written upright.

Boxes and masks are in the frame after EXIF rotation, which some readers (torchvision's VOC, WebDataset) do not apply.
An image with an orientation other than upright is therefore decoded and written again, JPEG with quality 95. All others
keep their bytes: a hard link, or a copy if the export is on another file system or `copy` is set. A format that the
reader does not know becomes PNG.
"""

from __future__ import annotations

import io
import os
import posixpath
import shutil
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from lumen_ray.data.images import decode
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.labels import LabelledImage, Picture

_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif"}
_ORIENTATION = 0x0112


def write_picture(image: LabelledImage, picture: Picture, folder: Path, *, copy: bool = False) -> str:
    """Writes the image file into `folder`; returns its name, ``image.name`` with a suffix."""
    data, suffix = encoded(image, picture, read=False)
    target = folder / f"{image.name}{suffix}"
    if data is not None:
        target.write_bytes(data)
        return target.name
    assert picture.file is not None
    if copy or _is_cut_off(picture.file):
        shutil.copyfile(picture.file, target)
        return target.name
    try:
        os.link(os.path.realpath(picture.file), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(picture.file, target)
    return target.name


def encoded(
    image: LabelledImage, picture: Picture, *, read: bool = True, kinds: Collection[str] = tuple(_SUFFIX)
) -> tuple[bytes | None, str]:
    """(encoded bytes, suffix) of the upright picture; None for the bytes of a file that can be used as it is, unless
    `read`. `kinds`: formats that are kept, by Pillow's names; others become PNG."""
    kind, upright = _inspect(picture)
    suffix = posixpath.splitext(image.image_id)[1].lower()
    if _SUFFIX.get(kind) != (".jpg" if suffix == ".jpeg" else ".tif" if suffix == ".tiff" else suffix):
        suffix = _SUFFIX.get(kind, ".png")
    if upright and kind in kinds:
        return (picture.data if picture.data is not None or not read else _bytes(picture)), suffix
    buffer = io.BytesIO()
    pixels = Image.fromarray(decode(_bytes(picture)))
    if suffix in (".jpg", ".jpeg"):
        pixels.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        suffix = ".png"
        pixels.save(buffer, "PNG")
    return buffer.getvalue(), suffix


def _is_cut_off(file: Path) -> bool:
    """Whether a JPEG lacks its end mark: older versions of ultralytics write such a file again in place, which through
    a link would change the user's own."""
    with file.open("rb") as opened:
        if opened.read(2) != b"\xff\xd8":
            return False
        opened.seek(-2, os.SEEK_END)
        return opened.read() != b"\xff\xd9"


def _bytes(picture: Picture) -> bytes:
    if picture.data is not None:
        return picture.data
    assert picture.file is not None
    return picture.file.read_bytes()


def _inspect(picture: Picture) -> tuple[str, bool]:
    """(Pillow's name of the format, whether the pixels are stored upright); reads the header only."""
    try:
        with Image.open(io.BytesIO(picture.data) if picture.data is not None else picture.file) as opened:  # type: ignore[arg-type]  # one of the two is there
            return opened.format or "", opened.getexif().get(_ORIENTATION, 1) in (0, 1)
    except Image.DecompressionBombError:  # so large are only TIFF files that were read by window, which are upright
        return "TIFF", True
    except (OSError, ValueError, SyntaxError) as error:
        name = picture.file or "an image of a shard"
        raise UserError(f"'{name}' cannot be read any more: {error}", "broken_image") from None
