"""Pascal VOC: a folder of xml files, one per image, with optional ImageSets lists and object masks.

Pictures: the one with the xml's own name in the sub-folder of the same path below the image folder, else the one that
``<filename>`` names there, in ``<folder>`` or at the top. If ``<filename>`` names another existing picture than the
xml's own, the file was renamed or copied, and the xml is rejected unless both are equal. A picture belongs to one xml.

Boxes: VOC counts pixels from 1 and includes both edges, so ``xmin, ymin, xmax, ymax`` cover ``xmin - 1 .. xmax`` here.
Label Studio and datumaro count from 0 with an exclusive far edge, which a coordinate of 0 proves; the convention is
inferred for the folder unless `first_pixel` is given. Rectangles may be turned: an attribute ``rotation`` (CVAT,
degrees) or a ``robndbox`` (roLabelImg: centre, size and angle in radians).

Objects marked *difficult* are outside VOC's evaluation: they become crowd, which training and evaluation ignore (or
ordinary objects with ``difficult="object"``). *Truncated* and *occluded* ones are ordinary objects whose boxes cover
the visible pixels. Body parts (``part``) and actions are not read.

Masks (``SegmentationObject``): pixel value k is the k-th object of the xml, 255 the border that belongs to no object.
Classes are those of all xml files read: VOC annotates them all exhaustively in every image.

Frame: inferred from the xml's ``size``, by the rule of `data.sources.coco`.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lumen_ray.data import files, urls
from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.images import decode_labels
from lumen_ray.data.pictures import is_hidden, left_out_note, list_pictures
from lumen_ray.data.sources.base import Listing, Outcome, Rejected, Source, lost_image, reject
from lumen_ray.data.sources.objects import ObjectList, rotated_corners
from lumen_ray.data.sources.voc_pictures import PictureIndex, assign_pictures
from lumen_ray.data.values import declared_size, flag, number, numbers
from lumen_ray.errors import UserError, unknown
from lumen_ray.structures import Masks

DIFFICULT = ("crowd", "object")
_BORDER = 255


@dataclass
class VocSource(Source):
    """`annotations`: folder of xml files; `images`: folder of the images; `split`: an ImageSets list, or None for all
    xml files; `masks`: folder ``SegmentationObject``; `difficult`: "crowd" or "object"; `first_pixel`: 1, 0, or None to
    infer it."""

    annotations: str
    images: str
    split: str | None = None
    masks: str | None = None
    difficult: str = "crowd"
    first_pixel: int | None = None
    kind = "voc"

    def __post_init__(self) -> None:
        self.annotations, self.images = urls.absolute(self.annotations), urls.absolute(self.images)
        self.split = self.split and urls.absolute(self.split)
        self.masks = self.masks and urls.absolute(self.masks)
        if self.difficult not in DIFFICULT:
            raise unknown("difficult rule", self.difficult, DIFFICULT)
        if self.first_pixel not in (0, 1, None):
            raise UserError(f"first_pixel must be 1 (VOC) or 0, got {self.first_pixel}", "invalid_config")

    def read_listing(self) -> Listing:
        for folder in (self.annotations, self.images, *([self.masks] if self.masks else [])):
            if not files.is_dir(folder):
                raise UserError(f"folder '{urls.shown(folder)}' does not exist", "missing_folder")
        names, existing, rejected = self._xml_names()
        records = []
        locations = [urls.join(self.annotations, name) for name in names]
        for name, content in zip(names, files.read_many(locations), strict=True):
            try:
                records.append(_parse(name, content))
            except UserError as error:
                rejected.append(reject("images", name, name, error))
        if not records:
            why = f"; the first: {rejected[0]['reason']}" if rejected else ""
            raise UserError(f"none of the {len(rejected)} xml files can be used{why}", "empty_input")
        first_pixel, notes = self._convention(records)
        classes = sorted({o["name"] for record in records for o in record["objects"] if o["name"]})
        listed = sum(len(record["objects"]) for record in records)
        inputs = {"images": len(records) + len(rejected), "annotations": listed}
        pictures, others = list_pictures(self.images)
        notes += [note] if (note := left_out_note(others, urls.base_name(self.images))) else []
        records, lost = assign_pictures(
            records, PictureIndex(pictures), existing - {record["origin"] for record in records}
        )
        rejected += lost
        if self.masks:
            self._assign_masks(records, existing)
            inputs["masks"] = sum(record["mask"] is not None for record in records)
        categories = [{"name": name, "keypoints": [], "skeleton": []} for name in classes]
        shared = {"classes": classes, "first_pixel": first_pixel}
        return Listing(records, inputs, categories, shared, rejected, notes=notes)

    def _xml_names(self) -> tuple[list[str], set[str], list[Rejected]]:
        """The xml files to read, relative to `annotations`; all that exist; those of the split that do not."""
        existing = {n for n in files.list_files(self.annotations, [".xml"], recursive=True) if not is_hidden(n)}
        names = _split_names(self.split, existing) if self.split else sorted(existing)
        if not names:
            raise UserError(f"'{urls.shown(self.split or self.annotations)}' has no xml files", "empty_input")
        error = UserError("the split lists it, but it has no xml file", "missing_annotation")
        rejected = [reject("images", name, name, error) for name in names if name not in existing]
        return [name for name in names if name in existing], existing, rejected

    def _convention(self, records: Sequence[dict[str, Any]]) -> tuple[int, list[str]]:
        """(first pixel, notes). Raises `UserError` if the folder holds boxes that count from 0 and from 1."""
        if self.first_pixel is not None:
            return self.first_pixel, []
        proofs: dict[int, str] = {}
        for record in records:
            for found in record["objects"]:
                start = _counts_from(found["box"], record["size"])
                if start is not None:
                    proofs.setdefault(start, found["origin"])
        if len(proofs) == 2:
            raise UserError(
                f"the xml files count pixels in two ways: from 0 in '{proofs[0]}', from 1 in '{proofs[1]}'; prepare "
                "them separately, or give --first-pixel 0 or 1 for all",
                "invalid_annotations",
            )
        if 0 in proofs:
            return 0, [
                f"pixels are counted from 0, far edge excluded, as '{proofs[0]}' shows; --first-pixel 1 overrides it"
            ]
        return 1, ["pixels are counted from 1, far edge included, as in VOC; --first-pixel 0 overrides it"]

    def _assign_masks(self, records: Sequence[dict[str, Any]], existing: Collection[str]) -> None:
        """Finds each record's mask: the PNG of the xml's path, or of its bare name if no other xml of those
        `existing` has it."""
        assert self.masks is not None
        masks = {name for name in files.list_files(self.masks, [".png"], recursive=True) if not is_hidden(name)}
        bare = Counter(urls.stem(name) for name in existing)
        for record in records:
            own, flat = posixpath.splitext(record["origin"])[0], urls.stem(record["origin"])
            names = [own, *([flat] if bare[flat] == 1 else [])]
            record["mask"] = next((f"{name}.png" for name in names if f"{name}.png" in masks), None)

    def rows(self, record: dict[str, Any], shared: dict[str, Any]) -> Iterator[Outcome]:
        origins = [found["origin"] for found in record["objects"]]
        try:
            data = self._read_picture(record)
            frame = read_frame(data, [record["size"]])
        except UserError as error:
            outcome = lost_image(record["id"], record["origin"], error, origins=origins)
            if record["mask"]:
                outcome.rejected.append(reject("masks", record["id"], record["mask"], error))
            yield outcome
            return
        # "": an object without a name, which could be of any class
        lost = shared["classes"] if "" in record["lost"] else record["lost"]
        objects = ObjectList(record["id"], frame, [name for name in shared["classes"] if name not in lost])
        masks = Outcome()
        labels = self._labels(record, frame, masks)
        for place, found in enumerate(record["objects"], start=1):
            self._add(objects, found, None if labels is None else labels == place, shared["first_pixel"])
        outcome = objects.outcome(data, self.kind)
        outcome.written |= masks.written
        outcome.rejected += masks.rejected
        yield outcome

    def _read_picture(self, record: dict[str, Any]) -> bytes:
        if record["picture"] is None:
            raise UserError(f"the image file '{record['id']}' is missing", "missing_image")
        data = files.read_bytes(urls.join(self.images, record["picture"]))
        other = record["named"]
        if other and files.read_bytes(urls.join(self.images, other)) != data:
            raise UserError(
                f"its <filename> names '{other}', but the picture of its own name is '{record['picture']}', and the "
                "two differ",
                "other_image",
            )
        return data

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

    def _add(self, objects: ObjectList, found: dict[str, Any], pixels: np.ndarray | None, first_pixel: int) -> None:
        """Adds an object of the xml; `pixels`: its mask, bool [H, W], all False if it has none."""
        mask: Any = Masks.from_arrays(pixels[None]).rles[0] if pixels is not None and pixels.any() else None
        box: Any = None
        try:
            difficult = flag(found["difficult"], "difficult")
            if found["turned"] is not None:
                corners = _turned(found["turned"])
                x, y = corners[::2], corners[1::2]
                box, mask = [min(x), min(y), max(x), max(y)], mask or [corners]
            elif numbers(found["box"]) is not None or mask is None:  # else the box of the mask
                x1, y1, x2, y2 = _numbers(found["box"])
                drawn = any((x1, y1, x2, y2))  # all 0: no box, wherever pixels are counted from
                box = [x1 - first_pixel, y1 - first_pixel, x2, y2] if drawn else [0, 0, 0, 0]
        except UserError as error:
            objects.reject(found["name"] or None, found["origin"], error)
            return
        objects.add(
            found["name"],
            found["origin"],
            bbox=box,
            box_format="xyxy",
            segmentation=mask,
            crowd=difficult and self.difficult == "crowd",
            rotation=found["rotation"],
        )


def _counts_from(box: Any, size: Sequence[int]) -> int | None:
    """0 or 1 if a box (xmin, ymin, xmax, ymax as texts) proves where pixels are counted from, else None.

    A coordinate of 0 exists only when counting from 0. Counting from 1, with both edges included, is shown by a box of
    one column or row, which would have no area otherwise, and by one from 1 to the far edge of the image. A box of one
    point, as an accidental click leaves it, proves nothing.
    """
    values = numbers(box)
    if values is None:
        return None
    x1, y1, x2, y2 = values
    height, width = size
    if x2 > x1 and y2 > y1:
        if 0 <= min(x1, y1) < 1:
            return 0
        return 1 if (x1, x2) == (1, width) or (y1, y2) == (1, height) else None
    return 1 if (x1 == x2 and 1 <= y1 < y2) or (y1 == y2 and 1 <= x1 < x2) else None


def _split_names(location: str, existing: Collection[str]) -> list[str]:
    """The xml files of an ImageSets list, each once. A line is a name, which may contain blanks, or a name with a
    class's flag after it."""
    found = []
    for line in filter(None, map(str.strip, files.read_text(location).splitlines())):
        found.append(f"{line}.xml" if f"{line}.xml" in existing else f"{line.split()[0]}.xml")
    return list(dict.fromkeys(found))


def _parse(name: str, content: bytes | UserError) -> dict[str, Any]:
    """An xml file as a json value: the names of its picture, declared (height, width), and its objects, unchecked."""
    if isinstance(content, UserError):
        raise content
    try:
        root = ElementTree.fromstring(content)  # bytes: the xml declares its encoding
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"it is not valid xml: {error}", "invalid_annotations") from None
    if root.tag != "annotation":
        raise UserError(f"it is not a VOC file: its root is <{root.tag}>, not <annotation>", "invalid_annotations")
    objects = [_object(node, f"{name} object {n}") for n, node in enumerate(root.findall("object"), start=1)]
    return {
        "origin": name,
        "filename": (root.findtext("filename") or "").strip(),
        "folder": (root.findtext("folder") or "").strip(),
        "size": declared_size(root.findtext("size/height"), root.findtext("size/width")),
        "objects": objects,
        "mask": None,
        "lost": [],  # classes of objects in other xml files of the same picture
    }


def _object(node: ElementTree.Element, origin: str) -> dict[str, Any]:
    turned = node.find("robndbox") if node.find("bndbox") is None else None
    attributes = {a.findtext("name"): a.findtext("value") for a in node.findall("attributes/attribute")}
    return {
        "name": " ".join((node.findtext("name") or "").split()),
        "box": [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")],
        "turned": None if turned is None else [turned.findtext(key) for key in ("cx", "cy", "w", "h", "angle")],
        "rotation": attributes.get("rotation"),
        "difficult": node.findtext("difficult"),
        "origin": origin,
    }


def _numbers(texts: list[str | None]) -> list[float]:
    values = numbers(texts)  # files by MATLAB hold fractions
    if values is None:
        raise UserError(f"its bndbox needs the numbers xmin, ymin, xmax, ymax, got {texts}", "invalid_box")
    return values


def _turned(texts: list[str | None]) -> list[float]:
    """The corners of a ``robndbox``."""
    values = [number(text) for text in texts]
    cx, cy, width, height, angle = values
    if cx is None or cy is None or width is None or height is None or angle is None:
        raise UserError(f"its robndbox needs the numbers cx, cy, w, h, angle, got {texts}", "invalid_box")
    return rotated_corners(cx, cy, width, height, angle)
