"""Pascal VOC: a folder of xml files, one per image, with optional ImageSets lists and object masks.

Boxes: VOC counts pixels from 1 and includes both edges, so ``xmin, ymin, xmax, ymax`` cover ``xmin - 1 .. xmax`` here.
Files of tools that count from 0 with an exclusive far edge are read with ``first_pixel=0``. Objects marked *difficult*
are outside VOC's evaluation: they become crowd, which training and evaluation ignore (or ordinary objects with
``difficult="object"``). *Truncated* and *occluded* ones are ordinary objects whose boxes cover the visible pixels. Body
parts (``part``) and actions are not read.

Masks (``SegmentationObject``): pixel value k is the k-th object of the xml, 255 the border that belongs to no object.
Classes are those of all xml files read: VOC annotates them all exhaustively in every image.

Frame: inferred from the xml's ``size``, by the rule of `data.sources.coco`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lumen_ray.data import files, urls
from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.images import decode_labels
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.sources.base import (
    Listing,
    Outcome,
    Rejected,
    Source,
    image_locations,
    instance,
    lost_image,
    perception_tasks,
    read_first,
    reject,
)
from lumen_ray.data.sources.record_parsing import reserved_token, to_box
from lumen_ray.errors import UserError, unknown
from lumen_ray.structures import Masks

DIFFICULT = ("crowd", "object")
_BORDER = 255
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif")  # tried if the xml names no file


@dataclass
class VocSource(Source):
    """`annotations`: folder of xml files; `images`: folder of the images; `split`: an ImageSets list, or None for all
    xml files; `masks`: folder ``SegmentationObject``; `difficult`: "crowd" or "object"; `first_pixel`: 1 or 0."""

    annotations: str
    images: str
    split: str | None = None
    masks: str | None = None
    difficult: str = "crowd"
    first_pixel: int = 1
    kind = "voc"

    def __post_init__(self) -> None:
        self.annotations, self.images = urls.absolute(self.annotations), urls.absolute(self.images)
        self.split = self.split and urls.absolute(self.split)
        self.masks = self.masks and urls.absolute(self.masks)
        if self.difficult not in DIFFICULT:
            raise unknown("difficult rule", self.difficult, DIFFICULT)
        if self.first_pixel not in (0, 1):
            raise UserError(f"first_pixel must be 1 (VOC) or 0, got {self.first_pixel}", "invalid_config")

    def read_listing(self) -> Listing:
        for folder in (self.annotations, self.images, *([self.masks] if self.masks else [])):
            if not files.is_dir(folder):
                raise UserError(f"folder '{urls.shown(folder)}' does not exist", "missing_folder")
        names, rejected = self._xml_names()
        records = []
        for name, text in zip(names, files.read_texts([urls.join(self.annotations, n) for n in names]), strict=True):
            try:
                records.append(_parse(name, text))
            except UserError as error:
                rejected.append(reject("images", name, name, error))
        if not records:
            why = f"; the first: {rejected[0]['reason']}" if rejected else ""
            raise UserError(f"none of the {len(rejected)} xml files can be used{why}", "empty_input")
        classes = sorted({o["name"] for record in records for o in record["objects"] if o["name"]})
        categories = [{"name": name, "keypoints": [], "skeleton": []} for name in classes]
        inputs = {"images": len(records) + len(rejected), "annotations": sum(len(r["objects"]) for r in records)}
        if self.masks:
            masks = set(files.list_files(self.masks, [".png"]))
            for record in records:
                name = f"{urls.stem(record['origin'])}.png"
                record["mask"] = name if name in masks else None
            inputs["masks"] = sum(record["mask"] is not None for record in records)
        return Listing(records, inputs, categories, classes, rejected)

    def _xml_names(self) -> tuple[list[str], list[Rejected]]:
        """The xml files to read, relative to `annotations`, and those the split names that do not exist."""
        existing = set(files.list_files(self.annotations, [".xml"], recursive=True))
        names = [f"{name}.xml" for name in _split_names(self.split)] if self.split else sorted(existing)
        if not names:
            raise UserError(f"'{urls.shown(self.split or self.annotations)}' has no xml files", "empty_input")
        rejected = [
            reject("images", name, name, "the split lists it, but it has no xml file")
            for name in names
            if name not in existing
        ]
        return [name for name in names if name in existing], rejected

    def rows(self, record: dict[str, Any], shared: list[str]) -> Iterator[Outcome]:
        data = read_first(*(place for name in record["names"] for place in image_locations(self.images, name)))
        try:
            frame = read_frame(data, [record["size"]])
        except UserError as error:
            outcome = lost_image(
                record["id"], record["origin"], error, origins=[o["origin"] for o in record["objects"]]
            )
            if record["mask"]:
                outcome.rejected.append(reject("masks", record["id"], record["mask"], "its image was rejected"))
            yield outcome
            return
        outcome = Outcome()
        labels = self._labels(record, frame, outcome)
        instances, incomplete = [], set()
        for number, found in enumerate(record["objects"], start=1):
            try:
                instances.append(self._instance(found, None if labels is None else labels == number, frame))
            except UserError as error:
                incomplete.add(found["name"])
                outcome.rejected.append(reject("annotations", record["id"], found["origin"], error))
        classes = [name for name in shared if name not in incomplete and not reserved_token(name)]
        outcome.written["annotations"] = len(instances)
        outcome.row = make_row(record["id"], data, frame.rotated_size, self.kind, instances=instances, classes=classes,
                               tasks=perception_tasks(classes, instances))  # fmt: skip
        yield outcome

    def _labels(self, record: dict[str, Any], frame: AnnotationFrame, outcome: Outcome) -> np.ndarray | None:
        """Object numbers [H, W] of the image's mask file; None if there is no file or it cannot be used."""
        if not record["mask"]:
            return None
        assert self.masks is not None
        try:
            labels = decode_labels(files.read_bytes(urls.join(self.masks, record["mask"])))
            if labels.shape != tuple(frame.size):
                raise UserError(f"the mask image is {labels.shape[1]}x{labels.shape[0]}, the annotations are for "
                                f"{frame.size[1]}x{frame.size[0]} pixels", "size_mismatch")  # fmt: skip
            objects = {int(k) for k in np.unique(labels)} - {0, _BORDER}
            if extra := objects - set(range(1, len(record["objects"]) + 1)):
                raise UserError(
                    f"the mask image has an object {min(extra)}, but the xml has {len(record['objects'])} objects",
                    "invalid_mask",
                )
        except UserError as error:
            outcome.rejected.append(reject("masks", record["id"], record["mask"], error))
            return None
        outcome.written["masks"] = 1
        return labels

    def _instance(self, found: dict[str, Any], pixels: np.ndarray | None, frame: AnnotationFrame) -> dict[str, Any]:
        if not found["name"]:
            raise UserError("it has no name", "invalid_annotations")
        x1, y1, x2, y2 = _numbers(found["box"])
        box = to_box([x1 - self.first_pixel, y1 - self.first_pixel, x2, y2], "xyxy", frame.size)
        mask = Masks.from_arrays(pixels[None]).rles[0] if pixels is not None and pixels.any() else None
        crowd = found["difficult"] and self.difficult == "crowd"
        return frame.rotated(instance(found["name"], box, mask=mask, crowd=crowd))


def _split_names(location: str) -> list[str]:
    """Image names of an ImageSets list, each once. A line may also hold a class's flag after the name."""
    lines = files.read_text(location).splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split()))


def _parse(name: str, text: str | UserError) -> dict[str, Any]:
    """An xml file as a json value: image names to try, declared (height, width), and its objects, unchecked."""
    if isinstance(text, UserError):
        raise text
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"it is not valid xml: {error}", "invalid_annotations") from None
    if root.tag != "annotation":
        raise UserError(f"it is not a VOC file: its root is <{root.tag}>, not <annotation>", "invalid_annotations")
    named = (root.findtext("filename") or "").strip()
    stem = name.removesuffix(".xml")
    # labelling tools also write names without an extension, or of a file that was renamed since
    names = [*([named] if named else []), *(f"{stem}{suffix}" for suffix in _SUFFIXES)]
    objects = [_object(node, f"{name} object {n}") for n, node in enumerate(root.findall("object"), start=1)]
    size = [_whole(root.findtext(f"size/{side}")) for side in ("height", "width")]
    image_id = named if re.search(r"\.\w+$", named) else f"{stem}.jpg"
    return {"id": image_id, "origin": name, "names": names, "size": size, "objects": objects, "mask": None}


def _object(node: ElementTree.Element, origin: str) -> dict[str, Any]:
    box = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    difficult = (node.findtext("difficult") or "").strip().lower() in ("1", "true", "yes")
    name = " ".join((node.findtext("name") or "").split())
    return {"name": name, "box": box, "difficult": difficult, "origin": origin}


def _whole(text: str | None) -> int:
    """A declared side; 0, which declares nothing, if `text` is not a number."""
    return int(text) if text and re.fullmatch(r"\s*\d{1,9}\s*", text) else 0


def _numbers(texts: list[str | None]) -> list[float]:
    try:
        return [float(text or "") for text in texts]  # files by MATLAB hold fractions
    except ValueError:
        raise UserError(f"its bndbox needs the numbers xmin, ymin, xmax, ymax, got {texts}", "invalid_box") from None
