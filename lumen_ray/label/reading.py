"""Reads the images of a batch and decodes them: the part of a worker that runs ahead of the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.images import Picture, decode_reduced
from lumen_ray.data.windows import LargeImage, find_large
from lumen_ray.errors import UserError
from lumen_ray.label.inputs import Item, Reader
from lumen_ray.label.perceptual_hash import perceptual_hash


@dataclass
class ImageInHand:
    """An image of a fragment on its way: encoded `data`, `picture`, or `large` if it is read by window, then `records`;
    or an error's `reason` and `message`.

    `num_bytes`, `sha256` (hexadecimal): of its encoded bytes; `phash`: its perceptual hash; `twin`: see
    `duplicates.Copyable`."""

    item: Item
    data: bytes = b""
    picture: Picture | None = None
    large: LargeImage | None = None
    num_bytes: int = 0
    sha256: str = ""
    phash: str | None = None
    twin: ImageInHand | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    message: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it is neither failed nor labelled, nor going to be a copy."""
        return not (self.reason or self.twin or self.records)

    @property
    def is_ready(self) -> bool:
        """Whether the model can look at it."""
        return self.picture is not None or self.large is not None

    def error(self) -> dict[str, str]:
        """What the ledger keeps of a failure, a row of `ERROR_SCHEMA`."""
        return {
            "image_id": self.item.image_id,
            "path": urls.shown(self.item.path),
            "reason": self.reason,
            "message": self.message,
        }


def read_images(
    items: Sequence[Item],
    largest_side: int | None,
    reader: Reader,
    pool: ThreadPoolExecutor | None,
    fetchers: ThreadPoolExecutor,
    by_window: bool = False,
    look_up: Callable[[Sequence[ImageInHand]], None] | None = None,
    with_phash: bool = False,
) -> list[ImageInHand]:
    """Reads the images and decodes them at the scale that leaves their longer side `largest_side` pixels, all pixels
    for None. `by_window`: not those that are better read by window (see `data.windows`).

    pool: decodes, None for this thread; fetchers: read files of stores, several at once; all else `reader` reads in
    order; look_up: called with the images that could be read, of which those with a twin or records are not decoded.
    """

    def decoded(image: ImageInHand) -> ImageInHand:
        try:
            if not image.is_open:
                image.large = None
            elif by_window and image.data:
                image.large = find_large(image.data)
            if image.is_open and image.large is None:
                image.picture = decode_reduced(image.data, largest_side)
                image.phash = perceptual_hash(image.picture.pixels) if with_phash else None
        except UserError as error:
            image.reason, image.message = error.reason, str(error)
        image.data = b""
        return image

    waiting = [fetchers.submit(Reader().read, item) if _is_remote(item) else None for item in items]
    images: Iterable[ImageInHand] = (
        (by_window and _large_file(item)) or _received(item, fetched.result() if fetched else reader.read(item))
        for item, fetched in zip(items, waiting, strict=True)
    )
    if look_up is not None:
        images = list(images)
        look_up([image for image in images if not image.reason])
    if pool is None:
        return [decoded(image) for image in images]
    coming = [pool.submit(decoded, image) for image in images]  # while the next ones are read
    return [image.result() for image in coming]


def _received(item: Item, data: bytes | UserError) -> ImageInHand:
    if isinstance(data, UserError):
        return ImageInHand(item, reason=data.reason, message=str(data))
    return ImageInHand(item, data, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def find_large_file(item: Item) -> LargeImage | None:
    """A local file that is read by window, of which the whole is never in memory; None for other images. Raises
    `UserError` as `find_large`."""
    path = urls.split(item.path)[1]
    is_own_file = item.row_group < 0 and item.offset < 0 and not item.fault and not urls.is_url(item.path)
    if not is_own_file or not path.lower().endswith((".tif", ".tiff")) or not os.path.isfile(path):
        return None
    try:
        return find_large(path)
    except OSError:
        return None  # whoever reads it says what is wrong


def _large_file(item: Item) -> ImageInHand | None:
    try:
        if (large := find_large_file(item)) is None:
            return None
        with open(large.source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return ImageInHand(item, large=large, num_bytes=size, sha256=sha256)
    except OSError:
        return None
    except UserError as error:
        return ImageInHand(item, reason=error.reason, message=str(error))


def _is_remote(item: Item) -> bool:
    """Whether the image is a file of its own, or a member of a tar, in a store."""
    return item.row_group < 0 and not item.fault and urls.is_url(item.path)
