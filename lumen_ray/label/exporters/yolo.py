"""ultralytics folders: ``data.yaml``, ``images/`` and ``labels/`` with a text file per image; one folder per task.

Numbers are fractions of the sides of the upright image, boxes are clipped to it, and classes count from 0. An image
without instances has an empty file, which ultralytics takes for background. ``images.csv`` has the image id of each
file. Scores have no place in these files. `train` and `val` name the same images; split them before training.
"""

from __future__ import annotations

import csv
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.labels import Category, Labels, Record
from lumen_ray.outline import one_outline
from lumen_ray.structures import Boxes, Masks
from lumen_ray.tasks import Task
from lumen_ray.viz import KEYPOINT_SCORE


class _Yolo(Exporter):
    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        with ExitStack() as stack:
            tables = {task: self._start(target / task, labels.categories[task], stack) for task in labels.tasks}
            for image, picture in labels.pictures():
                for task in labels.tasks:
                    name = write_picture(image.name, picture, target / task / "images", copy=settings.copy_images)
                    tables[task].writerow([name, image.image_id, image.path])
                    lines = self._lines(image.instances(task), labels.categories[task])
                    (target / task / "labels" / f"{image.name}.txt").write_text("".join(lines))

    def _start(self, folder: Path, categories: dict[str, Category], stack: ExitStack) -> Any:
        """Makes the folder of a task, with its ``data.yaml``; returns the writer of its ``images.csv``."""
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True)
        found = list(categories.values())
        names = {category.id - 1: category.name for category in found}
        data = {"train": "images", "val": "images", "names": names, **self._settings(found)}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        (folder / "data.yaml").write_text(text, encoding="utf-8")
        table = csv.writer(stack.enter_context((folder / "images.csv").open("w", encoding="utf-8", newline="")))
        table.writerow(["file", "image_id", "path"])
        return table

    def _lines(self, records: list[Record], categories: dict[str, Category]) -> Iterator[str]:
        num_keypoints = max((len(category.keypoints) for category in categories.values()), default=0)
        for record in records:
            for numbers in self._rows(record, num_keypoints):
                values = (f"{value:.8f}".rstrip("0").rstrip(".") for value in numbers)
                yield f"{categories[record['phrase']].id - 1} {' '.join(values)}\n"

    def _settings(self, categories: list[Category]) -> dict[str, Any]:
        """More keys of ``data.yaml``."""
        return {}

    @abstractmethod
    def _rows(self, record: Record, num_keypoints: int) -> list[list[float]]:
        """The numbers of an instance behind its class: one row, or none if it covers no pixel of the image."""


class YoloDetect(_Yolo):
    """``class cx cy w h``."""

    def _rows(self, record: Record, num_keypoints: int) -> list[list[float]]:
        box = _box(record)
        return [box] if box[2] > 0 and box[3] > 0 else []


class YoloSegment(_Yolo):
    """``class x1 y1 x2 y2 ...``: one outline per object, see `outline.py`."""

    def holds(self, task: Task) -> bool:
        return task.result == "masks"

    def _rows(self, record: Record, num_keypoints: int) -> list[list[float]]:
        size = (record["height"], record["width"])
        points = one_outline(Masks([record["mask"]], size).to_arrays()[0])
        return [(points / size[::-1]).reshape(-1).tolist()] if len(points) else []


class YoloPose(_Yolo):
    """``class cx cy w h`` and ``x y v`` per keypoint: v is 2, or 0 where the score is below `KEYPOINT_SCORE`.

    ultralytics has one number of keypoints for all classes: those with fewer get more with v 0.
    """

    def holds(self, task: Task) -> bool:
        return task.result == "keypoints"

    def _settings(self, categories: list[Category]) -> dict[str, Any]:
        names = [category.keypoints for category in categories]
        longest = max(names, key=len, default=[])
        settings: dict[str, Any] = {"kpt_shape": [max(len(longest), 1), 3]}
        if all(found == longest for found in names if found) and (flipped := _flip_index(longest)):
            settings["flip_idx"] = flipped
        if any(names):
            settings["kpt_names"] = {
                k: found + [f"unused {n}" for n in range(len(found) + 1, len(longest) + 1)]
                for k, found in enumerate(names)
            }
        return settings

    def _rows(self, record: Record, num_keypoints: int) -> list[list[float]]:
        box = _box(record)
        if not (box[2] > 0 and box[3] > 0):
            return []
        height, width = record["height"], record["width"]
        flat = record["keypoints"]
        for x, y, score in zip(flat[0::3], flat[1::3], flat[2::3], strict=True):
            inside = score >= KEYPOINT_SCORE and 0 <= x <= width and 0 <= y <= height
            box += [x / width, y / height, 2.0] if inside else [0.0, 0.0, 0.0]
        return [box + [0.0] * (3 * (num_keypoints - len(flat) // 3))]


def _box(record: Record) -> list[float]:
    """Centre and size as fractions of the image."""
    height, width = record["height"], record["width"]
    x, y, w, h = Boxes(np.array([record["box"]]), (height, width)).clip().to_xywh()[0].tolist()
    return [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]


def _flip_index(names: list[str]) -> list[int]:
    """For each keypoint the number of its mirror image; empty if no name says left or right."""
    sides = {"left": "right", "right": "left"}
    mirrored = [
        re.sub("left|right", lambda found: sides[found[0].lower()], name, flags=re.IGNORECASE) for name in names
    ]
    lower = [name.lower() for name in names]
    index = [lower.index(other.lower()) if other.lower() in lower else k for k, other in enumerate(mirrored)]
    return index if index != list(range(len(names))) else []
