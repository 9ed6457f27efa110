"""What the page shows of one image: its thumbnail, and its labels as JSON with masks at the thumbnail's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.data.images import Picture, decode_reduced
from lumen_ray.data.rle import runs
from lumen_ray.data.windows import LargeImage, find_large
from lumen_ray.label.exporters.image_files import changed_size
from lumen_ray.label.exporters.labels import LabelledImage, Record
from lumen_ray.label.gallery.layout import thousandths
from lumen_ray.structures import Masks, Size
from lumen_ray.tasks import get_task

#: longer side of a thumbnail, pixels; smaller images are not enlarged
THUMBNAIL_SIDE = 400
_QUALITY = 80
#: instances of a task that an image is drawn with, best scores first: a thousand would hide each other
MAX_DRAWN = 300


def write_thumbnail(source: bytes | LargeImage, size: Size, path: Path) -> Size:
    """Writes the thumbnail of an image, encoded or read by window; returns its (height, width).

    Raises `UserError` if it cannot be decoded or its (height, width) is not `size`, that of the image when labelled.
    """
    picture = _small_enough(source)
    if picture.size != size:
        raise changed_size(picture.size, size)
    small = Image.fromarray(picture.pixels)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small.save(path, "JPEG", quality=_QUALITY)
    return small.height, small.width


def _small_enough(source: bytes | LargeImage) -> Picture:
    large = source if isinstance(source, LargeImage) else find_large(source)
    if large is None:
        assert isinstance(source, bytes), "an image is encoded or read by window"
        return decode_reduced(source, THUMBNAIL_SIDE)
    with large.open() as windows:
        return windows.overview(THUMBNAIL_SIDE)


def labelled_card(image: LabelledImage, small: Size, tasks: tuple[str, ...], classes: dict[str, int]) -> dict[str, Any]:
    """A labelled image; `small`: (height, width) of its thumbnail, `classes`: name -> number.

    Keys: ``i`` image id, ``p`` path, ``s`` width and height, ``m`` size of the masks, ``t`` task number -> instances,
    each [class, score in thousandths, x1, y1, x2, y2, mask, keypoints], ``x`` task number -> [question, text]s. A mask
    is a COCO RLE string at the thumbnail's size, keypoints flat x, y, score in thousandths; 0 where there is none.
    """
    height, width = image.size
    card: dict[str, Any] = {"i": image.image_id, "p": image.path, "s": [width, height], "m": list(small), "t": {}}
    texts = {}
    for number, task in enumerate(tasks):
        if get_task(task).is_text:
            texts[number] = [[record["prompt"] or "", record["text"]] for record in image.texts(task)]
        elif best := _best(image.instances(task)):
            card["t"][number] = [_instance(record, classes[record["phrase"]], small) for record in best]
    return card | ({"x": texts} if texts else {})


def failed_card(image_id: str, path: str, reason: str, message: str) -> dict[str, Any]:
    """An image that could not be labelled, or not be read again; ``e``: reason and message."""
    return {"i": image_id, "p": path, "e": [reason, message]}


def _best(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: -record["score"])[:MAX_DRAWN]


def _instance(record: Record, number: int, small: Size) -> list[Any]:
    box = [round(value, 1) for value in record["box"]]
    flat = record["keypoints"] or []
    points = [
        value
        for x, y, score in zip(flat[0::3], flat[1::3], flat[2::3], strict=True)
        for value in (round(x, 1), round(y, 1), thousandths(score))
    ]
    mask = 0 if record["mask"] is None else _small_mask(record["mask"], (record["height"], record["width"]), small)
    return [number, thousandths(record["score"]), *box, mask, points or 0]


def _small_mask(rle: dict[str, Any], size: Size, small: Size) -> str:
    """The mask sampled to `small` (height, width), as the counts of its COCO RLE."""
    if size == small:
        return str(rle["counts"])
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(small, size, strict=True))
    ends = np.cumsum(runs(rle["counts"]))  # of the runs, which alternate and go down the columns
    mask = np.searchsorted(ends, columns * size[0] + rows[:, None], side="right") % 2 == 1
    return str(Masks.from_arrays(mask[None]).rles[0]["counts"])
