"""CVAT for images 1.1: ``annotations.xml``, and ``labels.json`` to paste into the task's label constructor.

Boxes, masks and keypoints of all tasks stand in one file: `box` for boxes, `mask` for masks, and for poses a `box` and
a `points` per keypoint, labelled with the keypoint's name and joined to its box by `group_id`; keypoints below
`KEYPOINT_SCORE` are left out. Texts are tags with the attribute `text`. Images are named by their ids: upload them with
the same names. Every shape has the attributes `score` and `task`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.label.exporters.xml_text import clean
from lumen_ray.structures import Masks
from lumen_ray.tasks import Task
from lumen_ray.viz import KEYPOINT_SCORE

_SHAPE_ATTRIBUTES = ("score", "task")
_TAG_ATTRIBUTES = ("text", "prompt")


class Cvat(Exporter):
    """All tasks in one file."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        attributes = _labels(labels)
        (target / "labels.json").write_text(json.dumps(_constructor(attributes), indent=1), encoding="utf-8")
        for ending, images in labels.parts(settings.max_images_per_file):
            with (target / f"annotations{ending}.xml").open("w", encoding="utf-8") as file:
                file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
                file.write(_meta(attributes))
                for image in images:
                    file.write(_image(image, labels.tasks))
                file.write("</annotations>\n")


def _labels(labels: Labels) -> dict[str, tuple[str, ...]]:
    """Label -> its attributes: classes, keypoints, and tasks with texts."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(labels.class_names(), _SHAPE_ATTRIBUTES)
    for task in labels.tasks:
        for category in labels.categories[task].values():
            found |= dict.fromkeys(category.keypoints, _SHAPE_ATTRIBUTES)
    for task in labels.text_tasks():
        found[task] = found.get(task, ()) + _TAG_ATTRIBUTES
    return found


def _constructor(attributes: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """The labels as CVAT's raw label constructor takes them."""
    text = {"mutable": True, "input_type": "text", "default_value": "", "values": [""]}
    return [
        {"name": name, "type": "any", "attributes": [{"name": attribute, **text} for attribute in found]}
        for name, found in attributes.items()
    ]


def _meta(attributes: dict[str, tuple[str, ...]]) -> str:
    parts = ["<meta><task><labels>\n"]
    for name, found in attributes.items():
        fields = "".join(
            f"<attribute><name>{attribute}</name><mutable>True</mutable><input_type>text</input_type>"
            "<default_value></default_value><values></values></attribute>"
            for attribute in found
        )
        parts.append(
            f"<label><name>{escape(clean(name))}</name><type>any</type><attributes>{fields}</attributes></label>\n"
        )
    return "".join([*parts, "</labels></task></meta>\n"])


def _image(image: LabelledImage, tasks: Iterable[str]) -> str:
    height, width = image.size
    lines = [
        f'<image id="{image.number - 1}" name={quoteattr(clean(image.image_id))} width="{width}" height="{height}">'
    ]
    group = 0
    for task in tasks:
        for record in image.texts(task):
            texts = {"text": record["text"], "prompt": record["prompt"] or ""}
            lines.append(f'<tag label={quoteattr(task)} source="auto">{_attributes(texts)}</tag>')
        for record in image.instances(task):
            group += record["keypoints"] is not None
            lines += _shapes(record, group)
    return "\n".join([*lines, "</image>\n"])


def _shapes(record: Record, group: int) -> list[str]:
    """The elements of one instance; `group`: number of its keypoints' group in the image."""
    common = f'label={quoteattr(clean(record["phrase"]))} source="auto" occluded="0" z_order="0"'
    attributes = _attributes({"score": f"{record['score']:.4f}", "task": record["task"]})
    if record["mask"] is not None:
        pixels = Masks([record["mask"]], (record["height"], record["width"])).to_arrays()[0]
        return [f"<mask {common} {place}>{attributes}</mask>"] if (place := _mask(pixels)) else []
    if record["keypoints"] is not None:
        common += f' group_id="{group}"'
    x1, y1, x2, y2 = record["box"]
    place = f'xtl="{x1:.2f}" ytl="{y1:.2f}" xbr="{x2:.2f}" ybr="{y2:.2f}"'
    shapes = [f"<box {common} {place}>{attributes}</box>"]
    flat = record["keypoints"] or []
    points = zip(record["keypoint_names"] or [], flat[0::3], flat[1::3], flat[2::3], strict=True)
    for name, x, y, score in points:
        if score >= KEYPOINT_SCORE:
            fields = _attributes({"score": f"{score:.4f}", "task": record["task"]})
            shapes.append(
                f'<points label={quoteattr(clean(name))} source="auto" occluded="0" z_order="0" '
                f'group_id="{group}" points="{x:.2f},{y:.2f}">{fields}</points>'
            )
    return shapes


def _attributes(values: dict[str, str]) -> str:
    return "".join(f'<attribute name="{name}">{escape(clean(value))}</attribute>' for name, value in values.items())


def _mask(pixels: np.ndarray) -> str:
    """Place and run lengths of a mask: row by row in its box, background first; empty if it has no pixel."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return ""
    top, left = int(rows[0]), int(columns[0])
    cut = pixels[top : rows[-1] + 1, left : columns[-1] + 1]
    flat = cut.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [len(flat)]])).tolist()
    code = ", ".join(map(str, [0, *runs] if flat[0] else runs))
    return f'rle="{code}" left="{left}" top="{top}" width="{cut.shape[1]}" height="{cut.shape[0]}"'
