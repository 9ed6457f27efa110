"""The labels of one image as plain JSON, for formats without a scheme of their own."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from lumen_ray.label.exporters.coco import xywh
from lumen_ray.label.exporters.labels import IMAGE_COLUMNS, INSTANCE_COLUMNS, LabelledImage, Labels
from lumen_ray.tasks import get_task

#: in place of a number from 0 to 1 that an instance does not have
NONE = -1.0


def sample(image: LabelledImage, labels: Labels) -> dict[str, Any]:
    """`image_id`, `height`, `width`, the image's columns that are not null throughout, and per task its answers: lists
    of equal lengths, empty where nothing was found; captions are one text.

    `bbox` is x, y, width, height in pixels of the upright image, `segmentation` COCO RLE, `keypoints` x, y, score per
    point. `presence`, `verified` and `agreement`, 0..1, are there if any instance of the task has them, with `NONE` for
    those that have none: pyarrow's reader of JSON moves values of lists with nulls to other rows (apache/arrow 51305).
    """
    height, width = image.size
    there = labels.columns_of(*labels.tasks)
    facts = {name: plain(getattr(image, name)) for name in IMAGE_COLUMNS if name in there}
    answers = {
        task: _text(image, task) if get_task(task).is_text else _objects(image, task, labels) for task in labels.tasks
    }
    return {"image_id": image.image_id, "height": height, "width": width, **facts, **answers}


def plain(value: Any) -> Any:
    """A value of a label table as JSON has it: times as ISO 8601."""
    return value.isoformat() if isinstance(value, datetime) else value


def _text(image: LabelledImage, task: str) -> Any:
    records = image.texts(task)
    if get_task(task).needs == "nothing":
        return records[0]["text"] if records else ""
    return {"question": [r["prompt"] or "" for r in records], "answer": [r["text"] for r in records]}


def _objects(image: LabelledImage, task: str, labels: Labels) -> dict[str, Any]:
    records = image.instances(task)
    objects: dict[str, Any] = {
        "bbox": [xywh(record) for record in records],
        "category": [record["phrase"] for record in records],
        "score": [record["score"] for record in records],
    }
    there = labels.columns_of(task)
    for name in (name for name in INSTANCE_COLUMNS if name in there):
        objects[name] = [NONE if record[name] is None else record[name] for record in records]
    if get_task(task).result == "masks":
        objects["segmentation"] = [record["mask"] for record in records]
    if get_task(task).result == "keypoints":
        objects["keypoints"] = [
            [[float(v) for v in flat[k : k + 3]] for k in range(0, len(flat), 3)]
            for flat in (record["keypoints"] or [] for record in records)
        ]
        objects["keypoint_names"] = [record["keypoint_names"] or [] for record in records]
    return objects
