"""CSV: a row per instance or text answer, all tasks in one table; UTF-8.

An answer without instances is a row without phrase and box. Masks are COCO RLE (`mask_size` height and width,
`mask_counts`), keypoints JSON, a list of name, x, y, score. Of the columns that may be null throughout, such as
`verified` and `sha256`, the table has those with a value in any row; times are ISO 8601 in UTC.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.label.exporters.sample_json import plain
from lumen_ray.tasks import Task

COLUMNS = (
    "image_id", "path", "width", "height", "task", "prompt", "phrase", "score", "x1", "y1", "x2", "y2", "mask_size",
    "mask_counts", "keypoints", "text",
)  # fmt: skip


class CsvTable(Exporter):
    """``labels.csv``."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        columns = labels.columns_of(*labels.tasks)
        for ending, images in labels.parts(settings.max_images_per_file):
            with (target / f"labels{ending}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS + columns)
                for image in images:
                    for task in labels.tasks:
                        writer.writerows(_row(image, record, columns) for record in image.records.get(task, ()))


def _row(image: LabelledImage, record: Record, columns: tuple[str, ...]) -> list[Any]:
    height, width = image.size
    mask = record["mask"] or {"size": [], "counts": None}
    flat = record["keypoints"] or []
    points = zip(record["keypoint_names"] or [], flat[0::3], flat[1::3], flat[2::3], strict=True)
    return [
        image.image_id, image.path, width, height, record["task"], record["prompt"], record["phrase"], record["score"],
        *(record["box"] or [None] * 4), " ".join(map(str, mask["size"])), mask["counts"],
        json.dumps([list(point) for point in points]) if flat else None, record["text"],
        *(plain(record[column]) for column in columns),
    ]  # fmt: skip
