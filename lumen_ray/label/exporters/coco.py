"""COCO JSON: one file per task, because detect, segment and pose label the same objects.

Images have the same numbers, in input order, in all files; `file_name` is the label table's `image_id`. Ids count from
1: pycocotools takes object 0 for "no match".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.json_file import JsonObject
from lumen_ray.label.exporters.labels import Category, LabelledImage, Labels, Record
from lumen_ray.structures import Boxes, Masks
from lumen_ray.tasks import Task, get_task
from lumen_ray.viz import KEYPOINT_SCORE


class Coco(Exporter):
    """``<task>.json``, captions in ``captions.json``.

    Perception tasks: boxes as xywh, `segmentation` as compressed RLE, `score`, keypoints with v 2 or, below
    `KEYPOINT_SCORE`, 0, and `keypoint_scores`. Captions: COCO's captions layout; other text tasks: `question` and
    `answer`.
    """

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        numbers = dict.fromkeys(labels.tasks, 0)
        for ending, images in labels.parts(settings.max_images_per_file):
            paths = {task: target / f"{file_stem(task)}{ending}.json" for task in labels.tasks}
            self._write_part(labels, images, paths, numbers)

    def _write_part(
        self, labels: Labels, images: Iterable[LabelledImage], paths: dict[str, Path], numbers: dict[str, int]
    ) -> None:
        """Writes one file per task; `numbers`: task -> annotations written before, which is updated."""
        files = {task: CocoFile(path, labels, task) for task, path in paths.items()}
        for image in images:
            for task, file in files.items():
                file.add_image(image, image.name)
                for annotation in image_annotations(image, task, labels):
                    numbers[task] += 1
                    file.add({"id": numbers[task], **annotation})
        for file in files.values():
            file.close()


class CocoFile:
    """One COCO JSON of one task."""

    def __init__(self, path: Path, labels: Labels, task: str) -> None:
        head: dict[str, Any] = {
            "info": {
                "description": f"lumen_ray labels, task {task}",
                "version": labels.model_version,
                "settings": labels.job,
            }
        }
        if not get_task(task).is_text:  # captions have none: `pycocotools` would look up the category of each
            head["categories"] = [_category(category) for category in labels.categories[task].values()]
        self._file = JsonObject(path, head, ["annotations", "images"])

    def add_image(self, image: LabelledImage, file_name: str) -> None:
        """Adds an image, with annotations or not."""
        height, width = image.size
        entry = {"id": image.number, "file_name": file_name, "height": height, "width": width, "path": image.path}
        self._file.add("images", entry)

    def add(self, annotation: dict[str, Any]) -> None:
        """Adds an annotation, which has its `id`."""
        self._file.add("annotations", annotation)

    def close(self) -> None:
        """Completes the file."""
        self._file.close()


def file_stem(task: str) -> str:
    """Name of a task's file, without suffix."""
    return "captions" if task == "caption" else task


def image_annotations(image: LabelledImage, task: str, labels: Labels) -> list[dict[str, Any]]:
    """The annotations of one image for one task, without ids."""
    if get_task(task).is_text:
        return [{"image_id": image.number, **_text(record)} for record in image.texts(task)]
    categories = labels.categories[task]
    return [
        {"image_id": image.number, "category_id": categories[record["phrase"]].id, **_instance(record)}
        for record in image.instances(task)
    ]


def xywh(record: Record) -> list[float]:
    """The box as x, y, width, height in pixels, to a thousandth."""
    boxes = Boxes(np.array([record["box"]]), (record["height"], record["width"]))
    return [round(value, 3) for value in boxes.to_xywh()[0].tolist()]


def _category(category: Category) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": category.id, "name": category.name}
    if category.keypoints:
        entry["keypoints"] = category.keypoints
        entry["skeleton"] = [[a + 1, b + 1] for a, b in category.edges]  # COCO counts from 1
    return entry


def _text(record: Record) -> dict[str, Any]:
    if record["task"] == "caption":
        return {"caption": record["text"]}
    return {"question": record["prompt"], "answer": record["text"]}


def _instance(record: Record) -> dict[str, Any]:
    size = (record["height"], record["width"])
    area = Boxes(np.array([record["box"]]), size).area
    item: dict[str, Any] = {"bbox": xywh(record), "area": float(area[0]), "iscrowd": 0, "score": record["score"]}
    if record["mask"] is not None:
        item["segmentation"] = record["mask"]
        item["area"] = float(Masks([record["mask"]], size).area[0])
    if record["keypoints"] is not None:
        item.update(_keypoints(record["keypoints"]))
    return item


def _keypoints(flat: list[float]) -> dict[str, Any]:
    """COCO's three numbers per keypoint; low-scored ones are 'not labelled', which COCO writes as zeros."""
    points: list[float] = []
    scores = flat[2::3]
    for x, y, score in zip(flat[0::3], flat[1::3], scores, strict=True):
        points += [round(x, 3), round(y, 3), 2] if score >= KEYPOINT_SCORE else [0, 0, 0]
    return {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3]), "keypoint_scores": scores}
