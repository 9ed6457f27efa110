"""COCO panoptic: a json of segments and a folder of PNG files whose pixels hold segment ids (R + 256 G + 65536 B).
Channels are read as stored, so a PNG of one channel, of 16 bits or with a palette has the ids that it was written with.

A thing segment is one object, as in COCO instances; ``iscrowd`` ones are crowd. A stuff segment ("sky") covers all of
its class in the image: it becomes one instance with a mask, so that "sky" can be prompted like any class (its count is
1), and the manifest marks the category with ``stuff``; with ``stuff="skip"`` only things are read. Every pixel that is
not void is annotated, so all classes are exhaustive.

Frame: inferred from the sizes of the PNG and in the json, by the rule of `data.sources.coco`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumen_ray.data import files, urls
from lumen_ray.data import rle as rle_tools
from lumen_ray.data.frames import read_frame
from lumen_ray.data.images import decode_ids
from lumen_ray.data.pictures import ListedNames, identity, read_picture
from lumen_ray.data.sources.base import Listing, Outcome, Rejected, Source, lost_image, reject
from lumen_ray.data.sources.coco_categories import short_entry, unused_parents, unused_parents_note
from lumen_ray.data.sources.coco_json import check_lost, parse
from lumen_ray.data.sources.objects import ObjectList
from lumen_ray.data.sources.record_parsing import short
from lumen_ray.data.values import declared_size, flag, id_key, is_file_name, name_text, numbers, whole
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
        images = _Images(self.annotations, data["images"])
        listed, used = images.add_annotations(data["annotations"], categories, skipped)
        parents = unused_parents(data["categories"], used)
        kept = [c for i, c in categories.items() if i not in skipped and c["name"] not in parents]
        lost = sum(record["kind"] == "images" for record in images.rejected)
        names = ListedNames(record["file_name"] for record in images.records)
        # also those of annotations that are rejected: their PNG must not be read for another image
        named = (entry.get("file_name") for entry in data["annotations"] if isinstance(entry, dict))
        pngs = ListedNames(name for name in named if isinstance(name, str) and is_file_name(name))
        ordered = sorted(images.records, key=lambda record: record["file_name"])
        return Listing(
            [
                r | {"trust": names.trust(r["file_name"]), "png_trust": pngs.trust(r["png"]) if r["png"] else 0}
                for r in ordered
            ],
            {"images": len(ordered) + lost, "annotations": listed},
            list({c["name"]: c for c in kept}.values()),
            list(dict.fromkeys(c["name"] for c in kept)),
            images.rejected,
            notes=[unused_parents_note(parents)] if parents else [],
        )

    def rows(self, record: dict[str, Any], shared: list[str]) -> Iterator[Outcome]:
        name = record["file_name"]
        try:
            if not record["png"]:
                raise UserError("no panoptic annotation names its PNG file", "missing_annotation")
            data = read_picture(self.images, name, record["trust"])
            png = read_picture(self.segments, record["png"], record["png_trust"])
            ids = _segment_ids(png, [*record["segments"], *record["skipped"]])
            frame = read_frame(data, [record["size"], ids.shape])
        except UserError as error:
            yield lost_image(name, record["annotated"], error, origins=[s["origin"] for s in record["segments"]])
            return
        lost = shared if "" in record["lost"] else record["lost"]  # "": of unknown category
        objects = ObjectList(name, frame, [c for c in shared if c not in lost])
        times = Counter(whole(segment["id"]) for segment in record["segments"])
        for segment in record["segments"]:
            try:
                mask = _mask(segment, ids, times)
            except UserError as error:
                objects.reject(segment["name"] or None, segment["origin"], error)
            else:  # the box of the mask, since both are exact
                objects.add(segment["name"], segment["origin"], segmentation=mask, crowd=segment["iscrowd"])
        listed = [
            *(number for number in times if number is not None),
            *(whole(s["id"]) or 0 for s in record["skipped"]),
            0,
        ]
        if unlisted := len(np.setdiff1d(np.unique(ids), listed)):
            objects.lose("segments of the PNG that the json does not list", unlisted)
        yield objects.outcome(data, self.kind)


def _segment_ids(png: bytes, segments: list[dict[str, Any]]) -> np.ndarray:
    """Segment ids, int64 [H, W], of a panoptic PNG: R + 256 G + 65536 B of its raw channels.

    A palette image is read by its indices or by its colours, since some tools store ids as indices and others compress
    colours to a palette: in the way that has more of the listed ids, and more of their areas and boxes right. Raises
    `UserError` if both ways are as good.
    """
    readings = [values @ _WEIGHTS[: values.shape[2]] for values in decode_ids(png)]
    ranks = [_agreement(ids, segments) for ids in readings]
    best = readings[ranks.index(max(ranks))]
    if any(rank == max(ranks) and (ids != best).any() for ids, rank in zip(readings, ranks, strict=True)):
        raise UserError(
            "its PNG file has a palette whose indices and whose colours could both be the ids", "ambiguous_palette"
        )
    return best


def _agreement(ids: np.ndarray, segments: list[dict[str, Any]]) -> tuple[int, int]:
    """(number of listed ids that are there, number of areas and boxes that agree)."""
    found = agreed = 0
    for segment in segments:
        pixels = ids == whole(segment["id"])
        if whole(segment["id"]) is None or not pixels.any():
            continue
        found += 1
        agreed += whole(segment["area"]) == pixels.sum()
        box = numbers(segment["bbox"])
        tight = rle_tools.tight_xywh(Masks.from_arrays(pixels[None]).rles[0])
        agreed += box is not None and len(box) == 4 and bool(np.abs(np.subtract(box, tight)).max() <= 1)
    return found, agreed


def _mask(segment: dict[str, Any], ids: np.ndarray, times: Counter[int | None]) -> dict[str, Any]:
    """The mask of a segment, COCO RLE; `times`: how many segments have each id."""
    if not segment["name"]:
        raise UserError(f"unknown category id {short(segment['category_id'])}", "unknown_category")
    this = whole(segment["id"])
    if this is None or this <= 0:
        raise UserError(f"its id must be a positive number, got {short(segment['id'])}", "invalid_id")
    if times[this] > 1:
        raise UserError(f"{times[this]} segments of the image have its id {this}", "repeated_id")
    pixels = ids == this
    if not pixels.any():
        raise UserError("its id is not in the PNG file", "invalid_mask")
    return Masks.from_arrays(pixels[None]).rles[0]


def _categories(path: str, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Categories of the manifest by id, with `stuff`."""
    found: dict[str, dict[str, Any]] = {}
    entries = data.get("categories")
    for entry in entries if isinstance(entries, list) else []:
        name = name_text(entry.get("name")) if isinstance(entry, dict) else None
        key = id_key(entry.get("id")) if name else None
        if name is None or key is None or (key in found and found[key]["name"] != name):
            raise UserError(
                f"'{urls.shown(path)}': a category needs a unique 'id' and a 'name', got {short_entry(entry)}",
                "invalid_annotations",
            )
        stuff = not flag(entry.get("isthing", 1), f"'{urls.shown(path)}': isthing of category '{name}'")
        found[key] = {"name": name, "keypoints": [], "skeleton": [], "stuff": stuff}
    if not found:
        raise UserError(
            f"'{urls.shown(path)}' is not panoptic json: it has no list 'categories'", "invalid_annotations"
        )
    return found


class _Images:
    """The records of the listing: images of the json with the segments of their annotations."""

    def __init__(self, path: str, entries: list[Any]):
        self.path = path
        self.rejected: list[Rejected] = []
        self._by_id: dict[str, dict[str, Any]] = {}
        self._repeats: set[str] = set()  # ids that list a file a second time
        first: dict[str, str] = {}
        for number, entry in enumerate(entries):
            key = id_key(entry.get("id")) if isinstance(entry, dict) else None
            name: Any = entry.get("file_name") if isinstance(entry, dict) else None
            if key is None or not is_file_name(name) or key in self._by_id:
                error = UserError(f"image {number} needs a unique 'id' and a 'file_name'", "invalid_annotations")
                self.rejected.append(reject("images", "", f"{urls.base_name(path)} image number {number}", error))
                continue
            same = identity(name)
            if first.setdefault(same, key) != key:
                why = f"image id {key} lists the file '{name}', which image id {first[same]} lists before"
                where = f"{urls.base_name(path)} image {key}"
                self.rejected.append(reject("images", name, where, UserError(why, "repeated_image")))
                self._by_id[key] = self._by_id[first[same]]
                self._repeats.add(key)
                continue
            size = declared_size(entry.get("height"), entry.get("width"))
            self._by_id[key] = {"file_name": name, "size": size, "png": "", "segments": [], "skipped": [], "lost": [],
                                "annotated": urls.base_name(path)}  # fmt: skip
        if self.rejected and not self._by_id:
            raise UserError(f"'{urls.shown(path)}': {self.rejected[0]['reason']}", "invalid_annotations")

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for key, record in self._by_id.items() if key not in self._repeats]

    def add_annotations(
        self, entries: list[Any], categories: dict[str, dict[str, Any]], skipped: set[str]
    ) -> tuple[int, set[str]]:
        """Adds segments to the records of their images; (number of segments, names of the categories they use)."""
        listed = 0
        used: set[str] = set()
        annotated: set[str] = set()
        pngs: dict[str, str] = {}  # PNG -> image that it belongs to
        unlisted: list[Rejected] = []
        for number, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {}
            origin = f"{urls.base_name(self.path)} annotation {number}"
            every = _segments(entry, categories, origin)
            segments = [s for s in every if id_key(s["category_id"]) not in skipped]
            listed += len(segments)
            used.update(s["name"] for s in segments)
            key = id_key(entry.get("image_id")) or ""
            image, png = self._by_id.get(key), entry.get("file_name") or ""
            png = png if is_file_name(png) else ""
            if image is None:
                why = UserError("its image is not in the file", "unknown_image")
                found = [reject("annotations", "", s["origin"], why) for s in segments]
                self.rejected += found
                unlisted += found
                continue
            why = UserError("its category is not in the file", "unknown_category")
            unlisted += [reject("annotations", "", s["origin"], why) for s in segments if not s["name"]]
            error = self._repeated(key, image, png, annotated, pngs)
            if error is not None:
                self.rejected += [reject("annotations", image["file_name"], s["origin"], error) for s in segments]
                image["lost"] += [s["name"] for s in segments]
                continue
            annotated.add(key)
            if png:
                pngs[identity(png)] = image["file_name"]
            others = [s for s in every if s not in segments]  # of skipped categories, which are in the PNG, too
            image |= {"png": png, "segments": segments, "skipped": others, "annotated": origin}
        check_lost(self.path, unlisted, listed, "segments")
        return listed, used

    def _repeated(
        self, key: str, image: dict[str, Any], png: str, annotated: set[str], pngs: dict[str, str]
    ) -> UserError | None:
        """Why an annotation is not the only one of its image or its PNG; None if it is."""
        if key in self._repeats:
            return UserError(f"its image id stands for the file '{image['file_name']}' a second time", "repeated_image")
        if key in annotated:
            return UserError("its image has an annotation already", "repeated_image")
        if png and identity(png) in pngs:
            return UserError(f"its PNG file '{png}' is that of the image '{pngs[identity(png)]}'", "repeated_image")
        return None


def _segments(entry: dict[str, Any], categories: dict[str, dict[str, Any]], origin: str) -> list[dict[str, Any]]:
    """The entry's segments, checked later by `_mask`."""
    listed = entry.get("segments_info")
    segments = []
    for number, segment in enumerate(listed if isinstance(listed, list) else []):
        segment = segment if isinstance(segment, dict) else {}
        kept = {key: segment.get(key) for key in ("id", "category_id", "bbox", "area", "iscrowd")}
        name = categories.get(id_key(segment.get("category_id")) or "", {"name": ""})["name"]
        segments.append(kept | {"name": name, "origin": f"{origin} segment {segment.get('id', f'number {number}')}"})
    return segments
