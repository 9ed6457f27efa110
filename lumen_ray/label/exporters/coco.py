"""COCO json from a labelled folder: one file per task, because detect, segment and pose label the same objects.

Images have the same numbers, in input order, in all files; `file_name` is the label table's `image_id`,
numbered where two differ by case alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.data.files import write_atomically
from lumen_ray.data.pictures import FileNames
from lumen_ray.inference.records import record_edges
from lumen_ray.label.ledger import open_finished
from lumen_ray.structures import Boxes, Masks
from lumen_ray.tasks import get_task
from lumen_ray.viz import KEYPOINT_SCORE


def export_coco(output: str | Path) -> list[Path]:
    """Writes ``coco/<task>.json`` in the labelled folder `output` and returns the paths.

    Perception tasks: boxes as xywh, `segmentation` as compressed RLE, `score`, keypoints with v 2 or, below
    `KEYPOINT_SCORE`, 0, and `keypoint_scores`. Captions: COCO's captions layout; other text tasks: `question` and
    `answer`.
    """
    ledger = open_finished(output)
    images: dict[tuple[str, str], dict[str, Any]] = {}
    names = FileNames()
    annotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
    categories: dict[str, dict[str, dict[str, Any]]] = {}
    job = ledger.settings() or {}
    for table in ledger.tables():
        for record in table.to_pylist():
            key = record["image_id"], record["path"]
            if (image := images.get(key)) is None:
                image = images[key] = _image(record, len(images) + 1, names.free(record["image_id"]))
            task = record["task"]
            items = annotations[task]
            if task not in categories:
                categories[task] = _requested(task, job)
            if get_task(task).is_text:
                items.append({"id": len(items) + 1, "image_id": image["id"], **_text(record)})
            elif record["box"] is not None:
                category = _category(categories[task], record["phrase"])
                items.append({"id": len(items) + 1, "image_id": image["id"], **_instance(record, category)})
    paths = []
    for task, items in annotations.items():
        path = Path(ledger.output, "coco") / f"{'captions' if task == 'caption' else task}.json"
        data = {
            "info": {"description": f"lumen_ray labels, task {task}", "settings": job},
            "images": list(images.values()),
            "annotations": items,
        }
        if not get_task(task).is_text:  # captions have none: `pycocotools` would look up the category of each
            data["categories"] = list(categories[task].values())
        text = json.dumps(data)
        write_atomically(path, partial(Path.write_text, data=text))
        paths.append(path)
    return paths


def _image(record: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    return {
        "id": number,
        "file_name": name,
        "height": record["height"],
        "width": record["width"],
        "path": record["path"],
    }


def _requested(task: str, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The job's classes in their order, with instances or not; empty for a task without classes."""
    categories: dict[str, dict[str, Any]] = {}
    for name in job["classes"] if get_task(task).needs == "classes" else ():
        _category(categories, name)
    return categories


def _category(categories: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return categories.setdefault(name, {"id": len(categories) + 1, "name": name})


def _text(record: dict[str, Any]) -> dict[str, Any]:
    if record["task"] == "caption":
        return {"caption": record["text"]}
    return {"question": record["prompt"], "answer": record["text"]}


def _instance(record: dict[str, Any], category: dict[str, Any]) -> dict[str, Any]:
    size = (record["height"], record["width"])
    boxes = Boxes(np.array([record["box"]]), size)
    item: dict[str, Any] = {
        "category_id": category["id"],
        "bbox": [round(v, 3) for v in boxes.to_xywh()[0].tolist()],
        "area": float(boxes.area[0]),
        "iscrowd": 0,
        "score": record["score"],
    }
    if record["mask"] is not None:
        item["segmentation"] = record["mask"]
        item["area"] = float(Masks([record["mask"]], size).area[0])
    if record["keypoints"] is not None:
        names = record["keypoint_names"]
        if "keypoints" not in category:
            category["keypoints"] = names
            category["skeleton"] = [[a + 1, b + 1] for a, b in record_edges(record)]  # COCO counts from 1
        item.update(_keypoints(record["keypoints"]))
    return item


def _keypoints(flat: list[float]) -> dict[str, Any]:
    """COCO's three numbers per keypoint; low-scored ones are 'not labelled', which COCO writes as zeros."""
    points: list[float] = []
    scores = flat[2::3]
    for x, y, score in zip(flat[0::3], flat[1::3], scores, strict=True):
        points += [round(x, 3), round(y, 3), 2] if score >= KEYPOINT_SCORE else [0, 0, 0]
    return {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3]), "keypoint_scores": scores}
