"""Label Studio: ``tasks.json`` to import, with one prediction per image, and ``labeling_config.xml`` for the project.

Each task has a control of its own: rectangles for boxes, brushes for masks, rectangles with keypoints inside for poses,
text areas for texts. Places are in percent of the upright image, as the editor shows it. Brush masks are in Label
Studio's own run-length code (of RGBA bytes, row by row), which keeps holes and parts; COCO RLE cannot be imported.

The address of an image is `image_url` and its id, or that of Label Studio's local files: its absolute path below
``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from lumen_ray.data import urls
from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.json_file import JsonList
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.label.exporters.xml_text import clean
from lumen_ray.structures import Boxes, Masks
from lumen_ray.tasks import Task, get_task
from lumen_ray.viz import KEYPOINT_SCORE

LOCAL_FILES = "/data/local-files/?d="
#: diameter of a keypoint in the editor, percent of the image's width
_POINT_SIZE = 0.75
_RUN_BITS = (3, 4, 8, 16)


class LabelStudio(Exporter):
    """Predictions of all tasks in one file."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        tree = ElementTree.ElementTree(_config(labels))
        ElementTree.indent(tree)
        tree.write(target / "labeling_config.xml", encoding="utf-8")
        for ending, images in labels.parts(settings.max_images_per_file):
            file = JsonList(target / f"tasks{ending}.json")
            for image in images:
                file.add(_task(image, labels, settings.image_url))
            file.close()


def _config(labels: Labels) -> ElementTree.Element:
    """The labelling configuration: `View` with the image and a control per task."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image", zoom="true", zoomControl="true")
    for task in labels.tasks:
        for control, prompt in _text_controls(labels, task):
            ElementTree.SubElement(view, "Header", value=clean(prompt or task))
            ElementTree.SubElement(view, "TextArea", name=control, toName="image", maxSubmissions="1", editable="true")
        if get_task(task).is_text:
            continue
        tag = "BrushLabels" if get_task(task).result == "masks" else "RectangleLabels"
        ElementTree.SubElement(view, "Header", value=task)
        _choices(view, tag, task, list(labels.categories[task]))
        points = [name for category in labels.categories[task].values() for name in category.keypoints]
        if points:
            _choices(view, "KeyPointLabels", f"{task}_keypoints", list(dict.fromkeys(points)))
    return view


def _choices(view: ElementTree.Element, tag: str, name: str, values: list[str]) -> None:
    control = ElementTree.SubElement(view, tag, name=name, toName="image")
    for value in values:
        ElementTree.SubElement(control, "Label", value=clean(value))


def _text_controls(labels: Labels, task: str) -> list[tuple[str, str]]:
    """(name of the text area, prompt) of each prompt of a text task; none for other tasks."""
    prompts = labels.prompts.get(task, [])
    return [(task if k == 1 else f"{task}_{k}", prompt) for k, prompt in enumerate(prompts, start=1)]


def _task(image: LabelledImage, labels: Labels, image_url: str | None) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    for task in labels.tasks:
        controls = {prompt: name for name, prompt in _text_controls(labels, task)}
        for record in image.texts(task):
            value = {"text": [record["text"]]}
            results.append(_result(image, len(results), controls[record["prompt"] or ""], "textarea", value))
        for record in image.instances(task):
            results += list(_instance(image, record, len(results)))
    scores = [result["score"] for result in results if "score" in result]
    prediction = {"model_version": labels.model_version or "lumen_ray", "result": results}
    if scores:
        prediction["score"] = sum(scores) / len(scores)
    data = {"image": _address(image, image_url), "image_id": image.image_id}
    return {"id": image.number, "data": data, "predictions": [prediction]}


def _address(image: LabelledImage, image_url: str | None) -> str:
    if image_url is not None:
        return image_url + quote(image.image_id)
    if urls.is_url(image.path):
        return image.path
    return LOCAL_FILES + quote(str(Path(image.path).absolute()).lstrip("/"))


def _result(image: LabelledImage, number: int, control: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    height, width = image.size
    return {
        "id": f"r{number + 1}",
        "type": kind,
        "from_name": control,
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value,
    }


def _instance(image: LabelledImage, record: Record, number: int) -> Iterator[dict[str, Any]]:
    """The results of one instance: a brush, or a rectangle and the keypoints inside it."""
    task, phrase, score = record["task"], clean(record["phrase"]), {"score": record["score"]}
    if record["mask"] is not None:
        pixels = Masks([record["mask"]], image.size).to_arrays()[0]
        value = {"format": "rle", "rle": brush_code(pixels), "brushlabels": [phrase]}
        yield _result(image, number, task, "brushlabels", value) | score
        return
    height, width = image.size
    x, y, w, h = Boxes(np.array([record["box"]]), image.size).clip().to_xywh()[0].tolist()
    place = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
    box = _result(image, number, task, "rectanglelabels", {**place, "rotation": 0, "rectanglelabels": [phrase]})
    yield box | score
    flat = record["keypoints"] or []
    points = zip(record["keypoint_names"] or [], flat[0::3], flat[1::3], flat[2::3], strict=True)
    for name, px, py, point_score in points:
        if point_score >= KEYPOINT_SCORE:
            number += 1
            place = {"x": 100 * px / width, "y": 100 * py / height, "width": _POINT_SIZE}
            value = {**place, "keypointlabels": [clean(name)]}
            point = _result(image, number, f"{task}_keypoints", "keypointlabels", value)
            yield point | {"score": point_score, "parentID": box["id"]}


def brush_code(mask: np.ndarray) -> list[int]:
    """A mask, bool [H, W], in Label Studio's run-length code ("rle-pack"), as a list of bytes.

    The code is of the H*W*4 bytes of an RGBA image, all four 255 in the mask: a header of 32 bits length, 5 bits word
    size, four times 4 bits run sizes; then per run a 1, two bits that choose the run size, the run's length - 1, and
    the byte. A run of the largest size is repeated for longer ones.
    """
    pixels = np.asarray(mask, bool).reshape(-1)
    ends = np.append(np.flatnonzero(pixels[1:] != pixels[:-1]) + 1, len(pixels))
    bits = [f"{4 * len(pixels):032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in _RUN_BITS)]
    start = 0
    for end in ends.tolist():
        value = "11111111" if pixels[start] else "00000000"
        left = 4 * (end - start)
        while left:
            run = min(left, 1 << _RUN_BITS[-1])
            choice = next(k for k, size in enumerate(_RUN_BITS) if run <= 1 << size)
            bits.append(f"1{choice:02b}{run - 1:0{_RUN_BITS[choice]}b}{value}")
            left -= run
        start = end
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))
