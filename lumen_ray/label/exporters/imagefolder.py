"""Hugging Face imagefolder: ``images/`` and ``metadata.jsonl`` with a line per image and a column per task.

    datasets.load_dataset("imagefolder", data_dir="export/imagefolder", split="train")

Columns have the same type in every line, and the first lines are those of the first images with a value in a column:
the reader takes the types from the first 10 MB and fails on a list that was empty, or a value that was null, until
then. Pictures without a line would be dropped, lines without a picture are an error, so images that could not be
labelled have neither.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.exporters.sample_json import sample
from lumen_ray.tasks import Task


class ImageFolder(Exporter):
    """All tasks in one table."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        (target / "images").mkdir()
        found = {".file_name", ".image_id", ".height", ".width"}  # in every line
        rest = target / ".metadata.tmp"
        with (target / "metadata.jsonl").open("wb") as first_lines, rest.open("w+b") as other_lines:
            for image, picture in labels.pictures():
                name = write_picture(image.name, picture, target / "images", copy=settings.copy_images)
                line = {"file_name": f"images/{name}", **sample(image, labels)}
                new = _typed(line) - found
                found |= new
                file = first_lines if new else other_lines
                file.write(json.dumps(line).encode() + b"\n")
            other_lines.seek(0)
            shutil.copyfileobj(other_lines, first_lines, 1 << 20)
        rest.unlink()


def _typed(value: Any, place: str = "") -> set[str]:
    """The places in a line of JSON that have a value, by which a reader knows their type."""
    if isinstance(value, dict):
        return {found for key, inner in value.items() for found in _typed(inner, f"{place}.{key}")}
    if isinstance(value, list):
        return {found for inner in value for found in _typed(inner, f"{place}[]")}
    return set() if value is None else {place}
