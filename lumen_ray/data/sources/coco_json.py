"""COCO json files, parsed and merged by image: the half of the COCO source that runs on the driver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.sources.base import Rejected, reject
from lumen_ray.data.sources.record_parsing import is_numbers, load_json
from lumen_ray.errors import UserError


@dataclass
class CocoImage:
    """All records of one image. `sizes`: the declared (height, width); `annotations`: object annotations with `name`
    (of the category) and `origin` added; `captions`: (text, origin).

    `path`: path of the file in a `coco_url` with its folder (train2017, val2017), empty without one. Classes annotated
    exhaustively: all of the files numbered in `files` (of `CocoSet.classes`); in federated files (LVIS) those with an
    annotation here or in `absent`, except those in `incomplete`.
    """

    file_name: str
    origin: str
    sizes: list[list[int]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    path: str = ""
    federated: bool = False

    def classes(self, by_file: Sequence[Sequence[str]]) -> list[str]:
        """The classes annotated exhaustively, without repeats; `by_file` is `CocoSet.classes`."""
        found = dict.fromkeys(name for number in self.files for name in by_file[number])
        if self.federated:
            found.update(dict.fromkeys([*(a["name"] for a in self.annotations), *self.absent]))
        return [name for name in found if name not in self.incomplete]


@dataclass
class CocoSet:
    """`images` in file-name order; `categories` as in the manifest; `rejected`: annotations without a known image or
    category; `listed`: number of annotations in the files; `merged`: number of those merged into an earlier one;
    `classes`: the category names of each file."""

    images: list[CocoImage]
    categories: list[dict[str, Any]]
    rejected: list[Rejected]
    listed: int = 0
    merged: int = 0
    classes: list[list[str]] = field(default_factory=list)


def parse(path: str) -> dict[str, Any]:
    """A COCO json file. Raises `UserError` if it has no lists `images` and `annotations`."""
    data = load_json(path)
    for key in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(
                f"annotation file '{urls.shown(path)}' is not COCO json: it has no list '{key}'", "invalid_annotations"
            )
    return data


def _category(entry: dict[str, Any]) -> dict[str, Any]:
    """A category of the manifest, with keypoints numbered from 0 (COCO: from 1)."""
    keypoints, skeleton = entry.get("keypoints") or [], entry.get("skeleton") or []
    if not (isinstance(keypoints, list) and all(isinstance(name, str) and name.strip() for name in keypoints)):
        raise UserError(f"keypoints must be a list of names, got {keypoints!r}", "invalid_annotations")
    if not (isinstance(skeleton, list) and all(_is_edge(edge, len(keypoints)) for edge in skeleton)):
        raise UserError(
            f"skeleton must be pairs of keypoint numbers in 1..{len(keypoints)}, got {skeleton!r}",
            "invalid_annotations",
        )
    edges = [[int(i) - 1 for i in edge] for edge in skeleton]
    return {"name": str(entry["name"]).strip(), "keypoints": keypoints, "skeleton": edges}


def _is_edge(edge: Any, num_keypoints: int) -> bool:
    whole = is_numbers(edge) and len(edge) == 2 and all(int(i) == i for i in edge)
    return whole and all(1 <= i <= num_keypoints for i in edge)


def _merge_categories(path: str, data: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[Any, str]:
    """Adds the file's categories to `known`; returns their names by id."""
    names: dict[Any, str] = {}
    entries = data.get("categories") or []
    if not isinstance(entries, list):
        raise UserError(f"'{urls.shown(path)}': categories must be a list", "invalid_annotations")
    for entry in entries:
        named = isinstance(entry, dict) and str(entry.get("name") or "").strip()
        if not named or not isinstance(entry.get("id"), int | str):
            raise UserError(
                f"'{urls.shown(path)}': a category needs 'id' and 'name', got {entry!r}", "invalid_annotations"
            )
        try:
            new = _category(entry)
        except UserError as error:
            raise UserError(f"'{urls.shown(path)}': category '{entry['name']}': {error}", error.reason) from None
        old = known.setdefault(new["name"], new)
        if not old["keypoints"]:
            old.update(keypoints=new["keypoints"], skeleton=new["skeleton"])
        elif new["keypoints"] and new["keypoints"] != old["keypoints"]:
            raise UserError(
                f"'{urls.shown(path)}': category '{new['name']}' has other keypoints than in an earlier file; "
                "prepare files with different keypoints separately",
                "invalid_annotations",
            )
        names[entry["id"]] = new["name"]
    return names


def _file_name(entry: dict[str, Any]) -> str | None:
    name = entry.get("file_name") or str(entry.get("coco_url") or "").rsplit("/", 1)[-1]
    return str(name) if name else None


def _url_path(entry: dict[str, Any]) -> str:
    """Folder and name at the end of a `coco_url`: LVIS has no file names, and its splits mix two folders of COCO."""
    return "/".join(str(entry.get("coco_url") or "").split("/")[3:][-2:])


def load(paths: Sequence[urls.Location]) -> CocoSet:
    """Parses and merges COCO json files: images by file name, categories by name, and objects listed by two files.

    Raises `UserError` if a file is missing or not COCO json. Single bad annotations are in `rejected`.
    """
    if not paths:
        raise UserError("give at least one COCO json file", "missing_annotations")
    merger = _Merger()
    for path in map(str, paths):
        merger.add(path, parse(path))
    images = [merger.images[name] for name in sorted(merger.images)]
    categories = list(merger.categories.values())
    return CocoSet(images, categories, merger.rejected, merger.listed, merger.merged, merger.classes)


class _Merger:
    """Collects the images, categories and annotations of several files."""

    def __init__(self) -> None:
        self.images: dict[str, CocoImage] = {}
        self.categories: dict[str, dict[str, Any]] = {}
        self.rejected: list[Rejected] = []
        self.classes: list[list[str]] = []
        self.listed = self.merged = 0
        self._before: dict[Any, list[dict[str, Any]]] = {}  # objects of earlier files, by `_object_key`

    def add(self, path: str, data: dict[str, Any]) -> None:
        names = _merge_categories(path, data, self.categories)
        self.classes.append(list(dict.fromkeys(names.values())))
        by_id = self._add_images(path, data["images"], names)
        self._before = {}
        for image in by_id.values():
            for annotation in image.annotations:
                self._before.setdefault(_object_key(image, annotation), []).append(annotation)
        self.listed += len(data["annotations"])
        for number, entry in enumerate(data["annotations"]):
            entry = entry if isinstance(entry, dict) else {}
            origin = f"{urls.base_name(path)} annotation {entry.get('id', f'number {number}')}"
            self._add_annotation(entry, origin, by_id, names)

    def _add_images(self, path: str, entries: list[Any], names: dict[Any, str]) -> dict[Any, CocoImage]:
        by_id: dict[Any, CocoImage] = {}
        for number, entry in enumerate(entries):
            key = entry.get("id") if isinstance(entry, dict) else None
            if not isinstance(key, int | str) or (name := _file_name(entry)) is None:
                raise UserError(
                    f"'{urls.shown(path)}': image {number} needs 'id' and 'file_name'", "invalid_annotations"
                )
            if key in by_id and by_id[key].file_name != name:
                raise UserError(f"'{urls.shown(path)}': image id {key} stands for two files", "invalid_annotations")
            image = by_id[key] = self.images.setdefault(name, CocoImage(name, urls.base_name(path)))
            image.sizes.append([entry.get("height") or 0, entry.get("width") or 0])
            image.path = image.path or _url_path(entry)
            if "neg_category_ids" in entry:  # LVIS: only some classes were annotated in this image
                image.federated = True
                image.absent += _names_of(entry["neg_category_ids"], names)
                image.incomplete += _names_of(entry.get("not_exhaustive_category_ids"), names)
            elif len(self.classes) - 1 not in image.files:
                image.files.append(len(self.classes) - 1)
        return by_id

    def _add_annotation(
        self, entry: dict[str, Any], origin: str, by_id: dict[Any, CocoImage], names: dict[Any, str]
    ) -> None:
        image = _lookup(by_id, entry.get("image_id"))
        if image is None:
            self.rejected.append(reject("annotations", "", origin, "its image is not in the file"))
        elif "caption" in entry:
            image.captions.append([str(entry["caption"] or ""), origin])
        elif (category := _lookup(names, entry.get("category_id"))) is None:
            reason = f"unknown category id {entry.get('category_id')}"
            self.rejected.append(reject("annotations", image.file_name, origin, reason))
        else:
            self._add_object(image, {**entry, "name": category, "origin": origin})

    def _add_object(self, image: CocoImage, new: dict[str, Any]) -> None:
        """Adds an object, or merges it into one of an earlier file with the same class and box (without box: outline).

        COCO lists a person in the instances file and again, with keypoints, in the keypoints file. Ids cannot identify
        it, since many tools number each file anew.
        """
        key = _object_key(image, new)
        if key is not None and self._before.get(key):
            old = self._before[key].pop()
            old.update({k: v for k, v in new.items() if v and not old.get(k)})
            self.merged += 1
        else:
            image.annotations.append(new)


def _object_key(image: CocoImage, annotation: dict[str, Any]) -> tuple[str, str] | None:
    """Class and place of an object, equal for 109 and 109.0; None if it has neither box nor outline."""
    bbox: Any = annotation.get("bbox")
    outline = annotation.get("segmentation")
    place: dict[str, Any]
    if is_numbers(bbox) and len(bbox) == 4:
        place = {"bbox": [round(float(c), 2) for c in bbox]}
    elif not bbox and outline:
        place = {"segmentation": outline}
    else:
        return None
    return image.file_name, json.dumps([annotation["name"], place])


def _names_of(ids: Any, names: dict[Any, str]) -> list[str]:
    found = (_lookup(names, i) for i in ids) if isinstance(ids, list) else ()
    return [name for name in found if name is not None]


def _lookup(table: dict[Any, Any], key: Any) -> Any:
    """`table[key]`; None if the key is missing or not an id."""
    return table.get(key) if isinstance(key, int | str) else None
