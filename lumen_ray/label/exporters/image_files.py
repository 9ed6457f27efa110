"""Image files of an export: linked, copied, or written upright.

Boxes and masks are in the frame after EXIF rotation, which some readers (torchvision's VOC, WebDataset) do not apply.
An image with an orientation other than upright is therefore decoded and written again, JPEG with quality 95. All others
keep their bytes: a hard link, or a copy if the export is on another file system or `copy` is set. A format that the
reader does not know becomes PNG.

An image is in an export only if it can be read and has the size that was labelled: one whose bytes have the hash of the
label table is not decoded again to find that out.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lumen_ray.data import files
from lumen_ray.data.images import decode
from lumen_ray.errors import UserError
from lumen_ray.structures import Size

_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif"}
#: formats that most readers know, by Pillow's names
KINDS = tuple(_SUFFIX)
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """An encoded, upright picture: the bytes of a local `file`, or `data`. `suffix`: of its file name."""

    suffix: str
    file: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """The encoded bytes."""
        if self.data is not None:
            return self.data
        assert self.file is not None, "a picture has data or a file"
        return self.file.read_bytes()


def open_picture(
    image_id: str, source: Path | bytes, size: Size, sha256: str | None, kinds: Collection[str] = KINDS
) -> Picture:
    """The picture of a labelled image, from its file or bytes.

    size: (height, width) that was labelled; sha256: of the bytes that were, None where it is unknown; kinds: formats
    that are kept, by Pillow's names; others become PNG. Raises `UserError` if it cannot be read any more or has another
    size now.
    """
    data = source if isinstance(source, bytes) else files.read_bytes(str(source))
    pixels = None if sha256 == hashlib.sha256(data).hexdigest() else _decode(data, size)
    kind, upright = _inspect(data)
    suffix = posixpath.splitext(image_id)[1].lower()
    if _SUFFIX.get(kind) != (".jpg" if suffix == ".jpeg" else ".tif" if suffix == ".tiff" else suffix):
        suffix = _SUFFIX.get(kind, ".png")
    if upright and kind in kinds:
        return Picture(suffix, data=data) if isinstance(source, bytes) else Picture(suffix, file=source)
    buffer = io.BytesIO()
    image = Image.fromarray(_decode(data, size) if pixels is None else pixels)
    if suffix in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        suffix = ".png"
        image.save(buffer, "PNG")
    return Picture(suffix, data=buffer.getvalue())


def write_picture(name: str, picture: Picture, folder: Path, *, copy: bool = False) -> str:
    """Writes the picture into `folder`; returns its file name, the stem `name` with a suffix."""
    target = folder / f"{name}{picture.suffix}"
    if picture.file is None:
        target.write_bytes(picture.read())
        return target.name
    if copy or _is_cut_off(picture.file):
        shutil.copyfile(picture.file, target)
        return target.name
    try:
        os.link(os.path.realpath(picture.file), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(picture.file, target)
    return target.name


def _is_cut_off(file: Path) -> bool:
    """Whether a JPEG lacks its end mark: older versions of ultralytics write such a file again in place, which through
    a link would change the user's own."""
    with file.open("rb") as opened:
        if opened.read(2) != b"\xff\xd8":
            return False
        opened.seek(-2, os.SEEK_END)
        return opened.read() != b"\xff\xd9"


def _decode(data: bytes, size: Size) -> np.ndarray:
    """uint8 [H, W, 3], upright. Raises `UserError` if it cannot be decoded or its (height, width) is not `size`."""
    pixels = decode(data)
    if pixels.shape[:2] != size:
        raise changed_size((pixels.shape[0], pixels.shape[1]), size)
    return pixels


def changed_size(now: Size, labelled: Size) -> UserError:
    """The error for an image of another (height, width) than when it was labelled."""
    return UserError(
        f"the image has {now[1]}x{now[0]} pixels, {labelled[1]}x{labelled[0]} when it was labelled; label it again in "
        "a new output folder",
        "changed_image",
    )


def _inspect(data: bytes) -> tuple[str, bool]:
    """(Pillow's name of the format, whether the pixels are stored upright) of an image that can be decoded."""
    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:  # so large are only TIFF files that were read by window, which are upright
        return "TIFF", True
    with opened:
        try:
            return opened.format or "", opened.getexif().get(_ORIENTATION, 1) in (0, 1)
        except (OSError, ValueError, SyntaxError):  # a damaged EXIF block, which `decode` passes over as well
            return opened.format or "", True
