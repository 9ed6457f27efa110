"""COCO panoptic: ``<task>.json`` and a folder of PNG files beside it, in which every pixel has the id of its segment.

An id is R + 256 G + 65536 B, 0 where nothing was found. Segments do not overlap in this format: a pixel that several
masks cover is that of the best score, and area and box are those of what is left of a segment; one of which nothing is
left is not in the file. Ids begin with the colour of the class, so that the PNG files can be looked at.

Classes of `segment` are things, those of `semantic`, which has one mask per class, stuff.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.json_file import JsonObject
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.structures import Masks, Size
from lumen_ray.tasks import Task, get_task
from lumen_ray.viz import Colour, palette

#: added to an id that is taken; odd, so that it leads to every id of 24 bits
_STEP = 0x13579B
_IDS = 1 << 24


class CocoPanoptic(Exporter):
    """One file and folder per task with masks; images have the numbers of format `coco`."""

    def holds(self, task: Task) -> bool:
        return task.result == "masks"

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        colours = {task: palette(list(labels.categories[task])) for task in labels.tasks}
        for ending, images in labels.parts(settings.max_images_per_file, stems=True):
            folders = {task: target / f"{task}{ending}" for task in labels.tasks}
            files = {task: _start(folder, labels, task, colours[task]) for task, folder in folders.items()}
            for image in images:
                for task, file in files.items():
                    pixels, segments = _segments(image, task, labels, colours[task])
                    name = f"{image.name}.png"
                    Image.fromarray(pixels).save(folders[task] / name)
                    height, width = image.size
                    entry = {"id": image.number, "file_name": image.image_id, "height": height, "width": width}
                    file.add("images", {**entry, "path": image.path})
                    file.add("annotations", {"image_id": image.number, "file_name": name, "segments_info": segments})
            for file in files.values():
                file.close()


def _start(folder: Path, labels: Labels, task: str, colours: dict[str, Colour]) -> JsonObject:
    """Makes the folder of PNG files and begins the JSON beside it."""
    folder.mkdir()
    is_thing = int(not get_task(task).joins_objects)
    categories = [
        {"id": c.id, "name": c.name, "supercategory": c.name, "isthing": is_thing, "color": list(colours[c.name])}
        for c in labels.categories[task].values()
    ]
    head = {
        "info": {
            "description": f"lumen_ray labels, task {task}",
            "version": labels.model_version,
            "settings": labels.job,
        },
        "categories": categories,
    }
    return JsonObject(folder.with_name(f"{folder.name}.json"), head, ["annotations", "images"])


def _segments(
    image: LabelledImage, task: str, labels: Labels, colours: dict[str, Colour]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(ids, uint8 [H, W, 3] with the lowest byte first, the entries of ``segments_info``), best score first."""
    records = sorted(image.instances(task), key=lambda record: -record["score"])
    pixels, free = np.zeros((*image.size, 3), np.uint8), np.ones(image.size, bool)
    segments: list[dict[str, Any]] = []
    used = {0}
    for record in records:
        visible = _mask(record, image.size)
        visible &= free
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        if not len(rows):
            continue
        number = _free(colours[record["phrase"]], used)
        free ^= visible
        for channel in range(3):
            np.copyto(pixels[..., channel], number >> 8 * channel & 255, where=visible)
        left, top = int(columns[0]), int(rows[0])
        segments.append(
            {
                "id": number,
                "category_id": labels.categories[task][record["phrase"]].id,
                "area": int(visible.sum()),
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "iscrowd": 0,
                "score": record["score"],
            }
        )
    return pixels, segments


def _mask(record: Record, size: Size) -> np.ndarray:
    return Masks([record["mask"]], size).to_arrays()[0]


def _free(colour: Colour, used: set[int]) -> int:
    """An id that no segment of the image has, the colour itself where it is free."""
    number = colour[0] + 256 * colour[1] + 65536 * colour[2]
    while number in used:
        number = (number + _STEP) % _IDS
    used.add(number)
    return number
