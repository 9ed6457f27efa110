"""Folders for FiftyOne's importer of `COCODetectionDataset`: ``data/`` and ``labels.json``, one folder per task.

fiftyone.Dataset.from_dir(dataset_dir="export/fiftyone/segment", dataset_type=fiftyone.types.COCODetectionDataset,
                          label_types="segmentations")
"""

from __future__ import annotations

from pathlib import Path

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.coco import CocoFile, image_annotations
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.labels import Labels


class FiftyOne(Exporter):
    """Scores become `confidence`. The importer has no place for texts."""

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        files = {}
        for task in labels.tasks:
            (target / task / "data").mkdir(parents=True)
            files[task] = CocoFile(target / task / "labels.json", labels, task)
        numbers = dict.fromkeys(labels.tasks, 0)
        for image, picture in labels.pictures():
            for task, file in files.items():
                name = write_picture(image.name, picture, target / task / "data", copy=settings.copy_images)
                file.add_image(image, name)
                for annotation in image_annotations(image, task, labels):
                    numbers[task] += 1
                    file.add({"id": numbers[task], **annotation})
        for file in files.values():
            file.close()
