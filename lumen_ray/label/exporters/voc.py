"""Pascal VOC: ``JPEGImages/``, ``Annotations/`` and ``ImageSets/Main/default.txt``; one folder per task, boxes only.

``labelmap.txt`` lists the classes for Datumaro and CVAT, which know only VOC's twenty without it.

Pixels are counted from 1 with both edges included, as in the devkit: a box ``xyxy`` that is exclusive at its far edge
becomes ``x1 + 1, y1 + 1, x2, y2`` in whole pixels. Boxes are clipped to the image, those outside of it left out. An
image without instances has an XML without objects.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.image_files import write_picture
from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.label.exporters.xml_text import clean
from lumen_ray.structures import Boxes


class Voc(Exporter):
    """Masks, keypoints and texts have no place."""

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        with ExitStack() as stack:
            lists = {}
            for task in labels.tasks:
                for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
                    (target / task / name).mkdir(parents=True)
                names = ["background", *map(clean, labels.categories[task])]
                label_map = "".join(f"{name}:::\n" for name in names)
                (target / task / "labelmap.txt").write_text(f"# label:color_rgb:parts:actions\n{label_map}", "utf-8")
                path = target / task / "ImageSets" / "Main" / "default.txt"
                lists[task] = stack.enter_context(path.open("w", encoding="utf-8"))
            for image, picture in labels.pictures():
                for task in labels.tasks:
                    name = write_picture(image.name, picture, target / task / "JPEGImages", copy=settings.copy_images)
                    tree = ElementTree.ElementTree(_annotation(image, task, name))
                    ElementTree.indent(tree)
                    tree.write(target / task / "Annotations" / f"{image.name}.xml", encoding="utf-8")
                    lists[task].write(f"{image.name}\n")


def _annotation(image: LabelledImage, task: str, file_name: str) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    height, width = image.size
    for tag, text in (("folder", "JPEGImages"), ("filename", file_name), ("path", image.path)):
        ElementTree.SubElement(root, tag).text = clean(text)
    ElementTree.SubElement(ElementTree.SubElement(root, "source"), "database").text = f"lumen_ray labels, task {task}"
    size = ElementTree.SubElement(root, "size")
    for tag, number in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(number)
    ElementTree.SubElement(root, "segmented").text = "0"
    for record in image.instances(task):
        if Boxes(np.array([record["box"]]), image.size).clip().area[0] > 0:
            _add_object(root, record)
    return root


def _add_object(root: ElementTree.Element, record: Record) -> None:
    found = ElementTree.SubElement(root, "object")
    texts = {"name": clean(record["phrase"]), "pose": "Unspecified", "truncated": "0", "difficult": "0"}
    for tag, text in texts.items():
        ElementTree.SubElement(found, tag).text = text
    box = ElementTree.SubElement(found, "bndbox")
    for tag, number in zip(("xmin", "ymin", "xmax", "ymax"), whole_box(record), strict=True):
        ElementTree.SubElement(box, tag).text = str(number)
    ElementTree.SubElement(found, "score").text = f"{record['score']:.4f}"


def whole_box(record: Record) -> tuple[int, int, int, int]:
    """The box in VOC's whole pixels: from 1, both edges included, at least one pixel, inside the image."""
    height, width = record["height"], record["width"]
    x1, y1, x2, y2 = np.rint(Boxes(np.array([record["box"]]), (height, width)).clip().xyxy[0]).astype(int).tolist()
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    return x1 + 1, y1 + 1, max(x2, x1 + 1), max(y2, y1 + 1)
