"""labelme: an image and a JSON beside it, all tasks in one file.

Boxes are rectangles, masks PNGs in their box, poses a rectangle and points of one `group_id`; keypoints below
`KEYPOINT_SCORE` are left out. `score` and `task` are further keys of a shape, which labelme keeps.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.structures import Masks
from lumen_ray.viz import KEYPOINT_SCORE

_VERSION = "5.5.0"  # of labelme, from which on shapes may be masks


class Labelme(Exporter):
    """Texts have no place."""

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        for image, picture in labels.pictures():
            name = write_picture(image.name, picture, target, copy=settings.copy_images)
            text = json.dumps(_label_file(image, name, labels.tasks), ensure_ascii=False, indent=2)
            (target / f"{image.name}.json").write_text(text, encoding="utf-8")


def _label_file(image: LabelledImage, file_name: str, tasks: tuple[str, ...]) -> dict[str, Any]:
    shapes: list[dict[str, Any]] = []
    group = 0
    for task in tasks:
        for record in image.instances(task):
            group += record["keypoints"] is not None
            shapes += _shapes(record, group)
    height, width = image.size
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": file_name,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
        "image_id": image.image_id,
    }


def _shapes(record: Record, group: int) -> list[dict[str, Any]]:
    if record["mask"] is not None:
        pixels = Masks([record["mask"]], (record["height"], record["width"])).to_arrays()[0]
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        if not len(rows):
            return []
        top, bottom, left, right = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
        shape = _shape(record, record["phrase"], "mask", [[left, top], [right, bottom]], record["score"])
        return [{**shape, "mask": _png(pixels[top : bottom + 1, left : right + 1])}]
    x1, y1, x2, y2 = record["box"]
    shapes = [_shape(record, record["phrase"], "rectangle", [[x1, y1], [x2, y2]], record["score"])]
    flat = record["keypoints"] or []
    points = zip(record["keypoint_names"] or [], flat[0::3], flat[1::3], flat[2::3], strict=True)
    shapes += [
        _shape(record, name, "point", [[x, y]], score) for name, x, y, score in points if score >= KEYPOINT_SCORE
    ]
    return [{**shape, "group_id": group} for shape in shapes] if flat else shapes


def _shape(record: Record, label: str, kind: str, points: list[list[float]], score: float) -> dict[str, Any]:
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
        "score": score,
        "task": record["task"],
    }


def _png(pixels: np.ndarray) -> str:
    """A mask, bool [H, W], as a base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
