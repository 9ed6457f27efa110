"""The labels of one image as columns of plain JSON, for formats without a scheme of their own."""

from __future__ import annotations

from typing import Any

from lumen_ray.label.exporters.coco import xywh
from lumen_ray.label.exporters.labels import LabelledImage, Labels
from lumen_ray.tasks import get_task


def columns(image: LabelledImage, labels: Labels) -> dict[str, Any]:
    """Task -> its answers: lists of equal lengths, empty where nothing was found; captions are one text.

    `bbox` is x, y, width, height in pixels of the upright image, `segmentation` COCO RLE, `keypoints` x, y, score per
    point.
    """
    return {task: _text(image, task) if get_task(task).is_text else _objects(image, task) for task in labels.tasks}


def _text(image: LabelledImage, task: str) -> Any:
    records = image.texts(task)
    if get_task(task).needs == "nothing":
        return records[0]["text"] if records else ""
    return {"question": [r["prompt"] or "" for r in records], "answer": [r["text"] for r in records]}


def _objects(image: LabelledImage, task: str) -> dict[str, Any]:
    records = image.instances(task)
    objects: dict[str, Any] = {
        "bbox": [xywh(record) for record in records],
        "category": [record["phrase"] for record in records],
        "score": [record["score"] for record in records],
    }
    if get_task(task).result == "masks":
        objects["segmentation"] = [record["mask"] for record in records]
    if get_task(task).result == "keypoints":
        objects["keypoints"] = [
            [[float(v) for v in flat[k : k + 3]] for k in range(0, len(flat), 3)]
            for flat in (record["keypoints"] or [] for record in records)
        ]
        objects["keypoint_names"] = [record["keypoint_names"] or [] for record in records]
    return objects
