"""Datumaro's JSON: ``annotations/default.json`` and ``images/``, all tasks in one file.

Every annotation has the attributes `score` and `task`. Masks are RLE with ``is_crowd`` False, without which Datumaro
exports them as crowds; a pose is a box and points of one group. Classes of all tasks share one list of labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.coco import xywh
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.json_file import JsonObject
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.tasks import Task
from lumen_ray.viz import KEYPOINT_SCORE

_IMAGE = 2  # Datumaro's number of the media type


class Datumaro(Exporter):
    """All tasks in one file, texts as captions."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        (target / "images").mkdir()
        names = labels.class_names()
        numbers = {name: number for number, name in enumerate(names)}
        head = {"dm_format_version": "1.0", "media_type": _IMAGE, "infos": {}, "categories": _categories(labels, names)}
        for ending, pairs in labels.picture_parts(settings.max_images_per_file):
            file = JsonObject(target / "annotations" / f"default{ending}.json", head, ["items"])
            for image, picture in pairs:
                name = write_picture(image.name, picture, target / "images", copy=settings.copy_images)
                file.add("items", _item(image, name, labels.tasks, numbers))
            file.close()


def _categories(labels: Labels, names: list[str]) -> dict[str, Any]:
    found = [{"name": name, "parent": "", "attributes": []} for name in names]
    categories: dict[str, Any] = {"label": {"labels": found, "label_groups": [], "attributes": []}}
    points = [
        {
            "label_id": names.index(category.name),
            "labels": category.keypoints,
            "joints": [[a + 1, b + 1] for a, b in category.edges],
        }
        for task in labels.tasks
        for category in labels.categories[task].values()
        if category.keypoints
    ]
    if points:
        categories["points"] = {"items": points}
    return categories


def _item(image: LabelledImage, file_name: str, tasks: tuple[str, ...], numbers: dict[str, int]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    group = 0
    for task in tasks:
        for record in image.texts(task):
            attributes = {"task": task, "prompt": record["prompt"] or ""}
            found.append({"type": "caption", "caption": record["text"], "attributes": attributes, "group": 0})
        for record in image.instances(task):
            group += 1
            common = {
                "attributes": {"task": task, "score": record["score"], "is_crowd": False},
                "group": group,
                "label_id": numbers[record["phrase"]],
                "z_order": 0,
            }
            found += [{**shape, **common} for shape in _shapes(record)]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(found, start=1)]
    return {
        "id": image.name,
        "annotations": annotations,
        "attr": {"image_id": image.image_id},
        "image": {"path": file_name, "size": list(image.size)},
    }


def _shapes(record: Record) -> list[dict[str, Any]]:
    if record["mask"] is not None:
        return [{"type": "mask", "rle": record["mask"]}]
    shapes: list[dict[str, Any]] = [{"type": "bbox", "bbox": xywh(record)}]
    if record["keypoints"] is not None:
        flat = record["keypoints"]
        points = [round(v, 3) for x, y in zip(flat[0::3], flat[1::3], strict=True) for v in (x, y)]
        visibility = [2 if score >= KEYPOINT_SCORE else 0 for score in flat[2::3]]
        shapes.append({"type": "points", "points": points, "visibility": visibility})
    return shapes
