"""The formats of `lumen-ray label export`, by name. `base.py` says how to add one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from lumen_ray.errors import UserError, unknown
from lumen_ray.tasks import TASKS, get_task

if TYPE_CHECKING:
    from lumen_ray.label.exporters.base import Exporter

#: what `lumen-ray label` writes unless it is told otherwise
DEFAULT_EXPORTS = ("coco", "gallery")
_PACKAGE = "lumen_ray.label.exporters"


@dataclass(frozen=True)
class Format:
    """`summary`: one line for the help; `target`: ``"module:Class"`` below this package, imported on first use;
    `is_overview`: pages and lists about the labels, not the labels in the format of a tool."""

    name: str
    summary: str
    target: str
    is_overview: bool = False

    def load(self) -> Exporter:
        """The exporter."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(f"{_PACKAGE}.{module}"), name)()


EXPORTERS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("coco", "COCO JSON, one file per task", "coco:Coco"),
        Format("coco-panoptic", "COCO panoptic: masks without overlaps as PNG and JSON", "coco_panoptic:CocoPanoptic"),
        Format("coco-results", "COCO results, the list that pycocotools' loadRes reads", "coco_results:CocoResults"),
        Format("csv", "one CSV row per instance or text", "csv_table:CsvTable"),
        Format("cvat", "CVAT for images 1.1: boxes, masks, points and tags in one XML", "cvat:Cvat"),
        Format("datumaro", "Datumaro JSON and images", "datumaro:Datumaro"),
        Format("duplicates", "CSV of groups of exact and near duplicates", "duplicates:Duplicates", is_overview=True),
        Format("fiftyone", "folders for FiftyOne's COCODetectionDataset importer", "fiftyone:FiftyOne"),
        Format(
            "gallery",
            "HTML page over any number of images, with filters and orders",
            "gallery_page:Gallery",
            is_overview=True,
        ),
        Format("imagefolder", "Hugging Face imagefolder: images and metadata.jsonl", "imagefolder:ImageFolder"),
        Format("labelme", "labelme JSON beside each image", "labelme:Labelme"),
        Format("labelstudio", "Label Studio predictions and labelling configuration", "labelstudio:LabelStudio"),
        Format(
            "report",
            "one HTML page: class balance, scores, empty and crowded images, errors",
            "report:Report",
            is_overview=True,
        ),
        Format(
            "review",
            "the images most worth a look, for Label Studio and as a gallery",
            "review:Review",
            is_overview=True,
        ),
        Format("voc", "Pascal VOC: XML and image per image, boxes only", "voc:Voc"),
        Format("webdataset", "WebDataset tars: image and JSON per sample", "webdataset:WebDataset"),
        Format("yolo-detect", "ultralytics folders of boxes", "yolo:YoloDetect"),
        Format("yolo-pose", "ultralytics folders of keypoints", "yolo:YoloPose"),
        Format("yolo-segment", "ultralytics folders of outlines", "yolo:YoloSegment"),
    )
}


def check_formats(names: Iterable[str]) -> list[str]:
    """The names, each once. Raises `UserError` for one that is no format, and if there are none."""
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in EXPORTERS:
            raise unknown("format", name, EXPORTERS)
    if not names:
        raise UserError(f"no format is given; formats: {', '.join(sorted(EXPORTERS))}", "unknown_format")
    return names


def choose_tasks(name: str, labelled: Sequence[str], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """The tasks that format `name` exports: those of `labelled` that it can hold, or `wanted`.

    Raises `UserError` if it can hold none of them, and for one of `wanted` that was not labelled or it cannot hold.
    """
    exporter = EXPORTERS[name].load()
    for task in wanted or ():
        get_task(task)
        if task not in labelled:
            raise UserError(
                f"task '{task}' is not among the labels; their tasks: {', '.join(labelled)}", "task_not_labelled"
            )
    held = [task for task in labelled if exporter.holds(get_task(task))]
    refused = [task for task in wanted or (() if held else labelled) if task not in held]
    if refused:
        can = ", ".join(task.name for task in TASKS.values() if task.result != "image" and exporter.holds(task))
        others = [
            form.name
            for form in EXPORTERS.values()
            if (EXPORTERS[name].is_overview or not form.is_overview)
            and all(form.load().holds(get_task(task)) for task in refused)
        ]
        raise UserError(
            f"format '{name}' cannot hold the answers of {', '.join(refused)}, only those of {can}; formats that can: "
            f"{', '.join(others)}",
            "unsupported_task",
        )
    return tuple(task for task in held if wanted is None or task in wanted)
