"""COCO panoptic: a json of segments and a folder of PNG files whose pixels hold segment ids (R + 256 G + 65536 B).

A thing segment is one object, as in COCO instances; ``iscrowd`` ones are crowd. A stuff segment ("sky") covers all of
its class in the image: it becomes one instance with a mask, so that "sky" can be prompted like any class (its count is
1), and the manifest marks the category with ``stuff``; with ``stuff="skip"`` only things are read. Every pixel that is
not void is annotated, so all classes are exhaustive.

Frame: inferred from the sizes of the PNG and in the json, by the rule of `data.sources.coco`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumen_ray.data import files, urls
from lumen_ray.data import rle as rle_tools
from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.images import decode
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
from lumen_ray.data.sources.coco_json import parse
from lumen_ray.data.sources.record_parsing import reserved_token, to_box
from lumen_ray.errors import UserError, unknown
from lumen_ray.structures import Masks

STUFF = ("keep", "skip")
_WEIGHTS = np.array([1, 256, 65536], np.int64)


@dataclass
class PanopticSource(Source):
    """`annotations`: panoptic json; `segments`: folder of its PNG files; `images`: folder of the images;
    `stuff`: "keep" or "skip"."""

    annotations: str
    segments: str
    images: str
    stuff: str = "keep"
    kind = "panoptic"

    def __post_init__(self) -> None:
        self.segments, self.images = urls.absolute(self.segments), urls.absolute(self.images)
        if self.stuff not in STUFF:
            raise unknown("stuff rule", self.stuff, STUFF)

    def read_listing(self) -> Listing:
        for folder in (self.segments, self.images):
            if not files.is_dir(folder):
                raise UserError(f"folder '{urls.shown(folder)}' does not exist", "missing_folder")
        data = parse(self.annotations)
        categories = _categories(self.annotations, data)
        skipped = {i for i, c in categories.items() if c["stuff"] and self.stuff == "skip"}
        records = _images(self.annotations, data["images"])
        listed, rejected = self._add_segments(records, data["annotations"], categories, skipped)
        kept = [c for i, c in categories.items() if i not in skipped]
        inputs = {"images": len(records), "annotations": listed}
        ordered = sorted(records.values(), key=lambda r: r["file_name"])
        return Listing(
            ordered, inputs, list({c["name"]: c for c in kept}.values()), [c["name"] for c in kept], rejected
        )

    def _add_segments(
        self, records: dict[Any, dict[str, Any]], entries: list[Any], categories: dict[Any, Any], skipped: set[Any]
    ) -> tuple[int, list[Rejected]]:
        """Adds the annotations to the records of their images; (number of segments, rejected ones)."""
        names = {i: c["name"] for i, c in categories.items()}
        rejected: list[Rejected] = []
        listed, annotated = 0, set()
        for number, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {}
            origin = f"{urls.base_name(self.annotations)} annotation {number}"
            segments = [s for s in _segments(entry, names, origin) if s["category_id"] not in skipped]
            listed += len(segments)
            key = _key(entry.get("image_id"))
            image = records.get(key)
            if image is None or key in annotated:
                why = "its image is not in the file" if image is None else "its image has an annotation already"
                rejected += [reject("annotations", "", s["origin"], why) for s in segments]
                continue
            annotated.add(key)
            image |= {"png": str(entry.get("file_name") or ""), "segments": segments, "annotated": origin}
        return listed, rejected

    def rows(self, record: dict[str, Any], shared: list[str]) -> Iterator[Outcome]:
        name = record["file_name"]
        data = read_first(*image_locations(self.images, name))
        try:
            if not record["png"]:
                raise UserError("no panoptic annotation names its PNG file", "missing_annotations")
            ids = decode(files.read_bytes(urls.join(self.segments, record["png"]))).astype(np.int64) @ _WEIGHTS
            frame = read_frame(data, [record["size"], ids.shape])
        except UserError as error:
            yield lost_image(name, record["annotated"], error, origins=[s["origin"] for s in record["segments"]])
            return
        outcome, instances, incomplete = Outcome(), [], set()
        for segment in record["segments"]:
            try:
                instances.append(_instance(segment, ids, frame))
            except UserError as error:
                incomplete.add(segment["name"])
                outcome.rejected.append(reject("annotations", name, segment["origin"], error))
        classes = [c for c in shared if c not in incomplete and not reserved_token(c)]
        outcome.written = {"annotations": len(instances)}
        outcome.row = make_row(name, data, frame.rotated_size, self.kind, instances=instances, classes=classes,
                               tasks=perception_tasks(classes, instances))  # fmt: skip
        yield outcome


def _key(value: Any) -> Any:
    return value if isinstance(value, int | str) else None


def _categories(path: str, data: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Categories of the manifest by id, with `stuff`."""
    found: dict[Any, dict[str, Any]] = {}
    entries = data.get("categories")
    for entry in entries if isinstance(entries, list) else []:
        name = str(entry.get("name") or "").strip() if isinstance(entry, dict) else ""
        if not name or _key(entry.get("id")) is None:
            raise UserError(
                f"'{urls.shown(path)}': a category needs 'id' and 'name', got {entry!r}", "invalid_annotations"
            )
        found[entry["id"]] = {"name": name, "keypoints": [], "skeleton": [], "stuff": entry.get("isthing") == 0}
    if not found:
        raise UserError(
            f"'{urls.shown(path)}' is not panoptic json: it has no list 'categories'", "invalid_annotations"
        )
    return found


def _images(path: str, entries: list[Any]) -> dict[Any, dict[str, Any]]:
    """The records of the listing by image id, without segments."""
    found: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        if key is None or not isinstance(entry.get("file_name"), str) or key in found:
            raise UserError(
                f"'{urls.shown(path)}': image {number} needs a unique 'id' and a 'file_name'", "invalid_annotations"
            )
        size = [entry.get("height") or 0, entry.get("width") or 0]
        found[key] = {"file_name": entry["file_name"], "size": size, "png": "", "segments": []}
        found[key]["annotated"] = urls.base_name(path)
    return found


def _segments(entry: dict[str, Any], names: dict[Any, str], origin: str) -> list[dict[str, Any]]:
    """The entry's segments, checked later by `_instance`."""
    listed = entry.get("segments_info")
    segments = []
    for number, segment in enumerate(listed if isinstance(listed, list) else []):
        segment = segment if isinstance(segment, dict) else {}
        category = _key(segment.get("category_id"))
        kept = {key: segment.get(key) for key in ("id", "bbox", "iscrowd")}
        where = f"{origin} segment {segment.get('id', f'number {number}')}"
        segments.append(kept | {"category_id": category, "name": names.get(category, ""), "origin": where})
    return segments


def _instance(segment: dict[str, Any], ids: np.ndarray, frame: AnnotationFrame) -> dict[str, Any]:
    if not segment["name"]:
        raise UserError(f"unknown category id {segment['category_id']}", "unknown_category")
    if not isinstance(segment["id"], int) or segment["id"] <= 0:
        raise UserError(f"its id must be a positive number, got {segment['id']!r}", "invalid_annotations")
    pixels = ids == segment["id"]
    if not pixels.any():
        raise UserError("its id is not in the PNG file", "invalid_mask")
    mask = Masks.from_arrays(pixels[None]).rles[0]
    box = to_box(segment["bbox"] or rle_tools.tight_xywh(mask), "xywh", frame.size)
    return frame.rotated(instance(segment["name"], box, mask=mask, crowd=bool(segment["iscrowd"])))
