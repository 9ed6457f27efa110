"""COCO results: per task the list that ``COCO.loadRes`` reads, with the image and category ids of format `coco`.

`loadRes` derives what is left out: the area of a mask, where only `segmentation` is given, or else that of the box.
Keypoints keep the places of low-scored ones, because OKS needs a place for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.coco import file_stem, xywh
from lumen_ray.label.exporters.json_file import JsonList
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.tasks import Task, get_task


class CocoResults(Exporter):
    """``<task>.json``; images without instances have no entry."""

    def holds(self, task: Task) -> bool:
        return not task.is_text or task.name == "caption"

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        for ending, images in labels.parts(settings.max_images_per_file):
            files = {task: JsonList(target / f"{file_stem(task)}{ending}.json") for task in labels.tasks}
            for image in images:
                for task, file in files.items():
                    for result in _results(image, task, labels):
                        file.add(result)
            for file in files.values():
                file.close()


def _results(image: LabelledImage, task: str, labels: Labels) -> list[dict[str, Any]]:
    if get_task(task).is_text:
        return [{"image_id": image.number, "caption": record["text"]} for record in image.texts(task)]
    categories = labels.categories[task]
    return [
        {
            "image_id": image.number,
            "category_id": categories[record["phrase"]].id,
            "score": record["score"],
            **_geometry(record),
        }
        for record in image.instances(task)
    ]


def _geometry(record: Record) -> dict[str, Any]:
    if record["mask"] is not None:
        return {"segmentation": record["mask"]}
    if record["keypoints"] is None:
        return {"bbox": xywh(record)}
    flat = record["keypoints"]
    points = [v for x, y in zip(flat[0::3], flat[1::3], strict=True) for v in (round(x, 3), round(y, 3), 1)]
    return {"bbox": xywh(record), "keypoints": points}
