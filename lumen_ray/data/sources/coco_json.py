"""COCO json files, parsed and merged by image: the half of the COCO source that runs on the driver.

Ids compare by value (`values.id_key`). An annotation whose image or category is not listed is an object that is lost:
its class, or every class, leaves the images on which it may have been, so that they are not trained as empty of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.pictures import BARE, ListedNames, identity
from lumen_ray.data.sources.base import Rejected, reject
from lumen_ray.data.sources.coco_categories import category_names, merge_categories, unused_parents, unused_parents_note
from lumen_ray.data.sources.record_parsing import fractions_note, load_json, short
from lumen_ray.data.values import declared_size, flag, id_key, is_file_name, numbers
from lumen_ray.errors import UserError


@dataclass
class CocoImage:
    """All records of one image. `image_id`: its id in the shards, unique; `sizes`: the declared (height, width);
    `annotations`: object annotations with `name` (of the category) and `origin` added; `captions`: (text, origin).

    `path`: path of the file in a `coco_url` with its folder (train2017, val2017), empty without one; `trust`: how far
    the file may be guessed, see `pictures.ListedNames`. Classes annotated exhaustively: all of the files numbered in
    `files` (of `CocoSet.classes`); in federated files (LVIS) those with an annotation here or in `absent`; neither
    those in `incomplete`, nor any if an object of unknown class was lost (`lost_any`).
    """

    file_name: str
    origin: str
    image_id: str = ""
    sizes: list[list[int]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    captions: list[list[Any]] = field(default_factory=list)
    path: str = ""
    trust: int = BARE
    federated: bool = False
    lost_any: bool = False

    def classes(self, by_file: Sequence[Sequence[str]]) -> list[str]:
        """The classes annotated exhaustively, without repeats; `by_file` is `CocoSet.classes`."""
        if self.lost_any:
            return []
        found = dict.fromkeys(name for number in self.files for name in by_file[number])
        if self.federated:
            found.update(dict.fromkeys([*(a["name"] for a in self.annotations), *self.absent]))
        return [name for name in found if name not in self.incomplete]

    def lose(self, name: str | None) -> None:
        """Notes that an object of class `name` (None: unknown) is missing from the annotations."""
        if name is None:
            self.lost_any = True
        elif name not in self.incomplete:
            self.incomplete.append(name)


@dataclass
class CocoSet:
    """`images` in file-name order; `categories` as in the manifest; `rejected`: images listed twice, and annotations
    without a known image or category; `listed`: number of annotations in the files; `merged`: number of those merged
    into an earlier one; `classes`: the category names of each file; `notes`: see `Listing`."""

    images: list[CocoImage]
    categories: list[dict[str, Any]]
    rejected: list[Rejected]
    listed: int = 0
    merged: int = 0
    classes: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse(path: str) -> dict[str, Any]:
    """A COCO json file. Raises `UserError` if it has no lists `images` and `annotations`."""
    data = load_json(path)
    for key in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(
                f"annotation file '{urls.shown(path)}' is not COCO json: it has no list '{key}'", "invalid_annotations"
            )
    return data


def check_lost(path: str, lost: Sequence[Rejected], total: int, what: str = "annotations") -> None:
    """Raises `UserError` with the first reason if more than half of a file's `total` records are `lost` because their
    image or category is not listed: then the lists do not belong to the records."""
    if lost and 2 * len(lost) > total:
        raise UserError(
            f"{len(lost)} of {total} {what} in '{urls.shown(path)}' name an image or a category that it does not "
            f"list; the first, {lost[0]['origin']}: {lost[0]['reason']}; correct the ids, or remove these {what}",
            "invalid_annotations",
        )


def load(paths: Sequence[urls.Location]) -> CocoSet:
    """Parses and merges COCO json files: images by file name, categories by name, and objects listed by two files.

    Raises `UserError` if a file is missing or not COCO json, or if most of its annotations name images or categories
    that it does not list. Single bad annotations are in `rejected`.
    """
    if not paths:
        raise UserError("give at least one COCO json file", "missing_annotations")
    merger = _Merger()
    for path in dict.fromkeys(urls.absolute(path) for path in paths):
        merger.add(path, parse(path))
    return merger.finish()


class _Merger:
    """Collects the images, categories and annotations of several files."""

    def __init__(self) -> None:
        self.images: dict[str, CocoImage] = {}  # by `pictures.identity` of the file name
        self.categories: dict[str, dict[str, Any]] = {}
        self.rejected: list[Rejected] = []
        self.classes: list[list[str]] = []
        self.notes: list[str] = []
        self.listed = self.merged = 0
        self._entries: list[Any] = []  # categories of all files as written
        self._used: set[str] = set()  # names of categories that an annotation or a list of absent ones uses
        self._crowds: Counter[bool] = Counter()  # objects with a mask: whether they are crowd
        self._before: dict[Any, list[dict[str, Any]]] = {}  # objects of earlier files, by `_object_key`

    def add(self, path: str, data: dict[str, Any]) -> None:
        names = merge_categories(path, data, self.categories)
        self._entries += data.get("categories") or []
        self.classes.append(list(dict.fromkeys(names.values())))
        by_id, repeats = self._add_images(path, data["images"], names)
        self._before = {}
        for known in by_id.values():
            for annotation in known.annotations:
                self._before.setdefault(_object_key(known, annotation), []).append(annotation)
        self.listed += len(data["annotations"])
        lost: list[Rejected] = []
        orphans: set[str | None] = set()  # classes of objects whose image is not listed
        for number, entry in enumerate(data["annotations"]):
            entry = entry if isinstance(entry, dict) else {}
            origin = f"{urls.base_name(path)} annotation {entry.get('id', f'number {number}')}"
            name = names.get(id_key(entry.get("category_id")) or "")
            key = id_key(entry.get("image_id")) or ""
            image = by_id.get(key)
            if image is None:
                why = UserError(f"its image id {short(entry.get('image_id'))} is not in the file", "unknown_image")
                lost.append(reject("annotations", "", origin, why))
                if "caption" not in entry:
                    orphans.add(name)
            elif key in repeats:
                why = UserError(f"its image id lists '{image.file_name}' a second time", "repeated_image")
                self.rejected.append(reject("annotations", image.file_name, origin, why))
                if "caption" not in entry:
                    image.lose(name)
            elif "caption" in entry:
                image.captions.append([entry["caption"], origin])
            elif name is None:
                why = UserError(f"unknown category id {short(entry.get('category_id'))}", "unknown_category")
                lost.append(reject("annotations", image.file_name, origin, why))
                image.lose(None)
            else:
                self._add_object(image, _kept(entry) | {"name": name, "origin": origin})
        if lost and not names:
            raise UserError(
                f"'{urls.shown(path)}' lists no categories; add them as 'categories'", "invalid_annotations"
            )
        check_lost(path, lost, len(data["annotations"]))
        boxes = [entry.get("bbox") for entry in data["annotations"] if isinstance(entry, dict)]
        self.notes += fractions_note(boxes, f"COCO's boxes are x, y, width, height in pixels: '{urls.base_name(path)}'")
        self.rejected += lost
        if orphans:
            self._lose_orphans(path, by_id.values(), orphans)

    def _lose_orphans(self, path: str, images: Iterable[CocoImage], orphans: set[str | None]) -> None:
        """Takes the classes of objects whose image is not listed off all images where they are not annotated."""
        for image in {id(image): image for image in images}.values():
            present = {annotation["name"] for annotation in image.annotations if _marks_something(annotation)}
            for name in orphans - present:
                image.lose(name)
        classes = ", ".join(sorted(f"'{name}'" for name in orphans if name)) or "all classes"
        self.notes.append(
            f"'{urls.base_name(path)}' has annotations of images that it does not list: no image of it is a negative "
            f"example for {'all classes' if None in orphans else classes}; remove these annotations to change that"
        )

    def finish(self) -> CocoSet:
        dropped = unused_parents(self._entries, self._used)
        for name in dropped:
            del self.categories[name]
        if dropped:
            self.classes = [[name for name in names if name not in dropped] for names in self.classes]
            self.notes.append(unused_parents_note(dropped))
        if self._crowds[True] > 1 and not self._crowds[False]:
            self.notes.append(
                f"all {self._crowds[True]} objects with a mask are marked iscrowd, as datumaro writes masks by "
                "default: crowds are neither trained nor scored; set iscrowd to 0 if they are single objects"
            )
        images = [self.images[key] for key in sorted(self.images, key=lambda key: self.images[key].file_name)]
        listed = ListedNames(image.file_name for image in images)
        for image in images:
            image.image_id = image.file_name
            image.trust = listed.trust(image.file_name)
        categories = list(self.categories.values())
        return CocoSet(images, categories, self.rejected, self.listed, self.merged, self.classes, self.notes)

    def _add_images(
        self, path: str, entries: list[Any], names: dict[str, str]
    ) -> tuple[dict[str, CocoImage], set[str]]:
        """(images by id, ids of entries that list an image of the file a second time).

        An entry without a usable id or name is rejected, and with it the annotations of its id, whose image is then not
        known. Raises `UserError` if no entry can be used.
        """
        by_id: dict[str, CocoImage] = {}
        first_ids: dict[str, str] = {}  # identity of the file name -> id
        repeats: set[str] = set()
        bad: list[Rejected] = []
        in_two_folders = _bare_urls_in_two_folders(entries)
        for number, entry in enumerate(entries):
            key = id_key(entry.get("id")) if isinstance(entry, dict) else None
            name = _file_name(entry, in_two_folders) if key is not None else None
            if key is None or name is None:
                error = UserError(f"image {number} needs an 'id' and a 'file_name'", "invalid_annotations")
                bad.append(reject("images", "", f"{urls.base_name(path)} image number {number}", error))
                continue
            same = identity(name)
            if key in by_id and identity(by_id[key].file_name) != same:
                raise UserError(
                    f"'{urls.shown(path)}': image id {key} stands for two files, '{by_id[key].file_name}' and "
                    f"'{name}'; give each image an id of its own",
                    "invalid_annotations",
                )
            if first_ids.setdefault(same, key) != key:
                by_id[key] = self.images[same]
                if key not in repeats:
                    error = UserError(
                        f"image id {key} lists the file '{name}', which image id {first_ids[same]} lists before",
                        "repeated_image",
                    )
                    self.rejected.append(reject("images", name, f"{urls.base_name(path)} image {key}", error))
                repeats.add(key)
                continue
            image = by_id[key] = self.images.setdefault(same, CocoImage(name, f"{urls.base_name(path)} image {key}"))
            image.sizes.append(declared_size(entry.get("height"), entry.get("width")))
            image.path = image.path or _url_path(entry)
            self._add_class_lists(image, entry, names)
        if bad and not by_id:
            raise UserError(f"'{urls.shown(path)}': {bad[0]['reason']}", "invalid_annotations")
        self.rejected += bad
        return by_id, repeats

    def _add_class_lists(self, image: CocoImage, entry: dict[str, Any], names: dict[str, str]) -> None:
        if "neg_category_ids" not in entry:
            if len(self.classes) - 1 not in image.files:
                image.files.append(len(self.classes) - 1)
            return
        image.federated = True  # LVIS: only some classes were annotated in this image
        absent, _ = category_names(entry["neg_category_ids"], names)
        image.absent += absent
        self._used.update(absent)
        partial, unknown = category_names(entry.get("not_exhaustive_category_ids"), names)
        image.incomplete += partial
        if unknown:
            image.lose(None)

    def _add_object(self, image: CocoImage, new: dict[str, Any]) -> None:
        """Adds an object, or merges it into one of an earlier file with the same class and box (without box: outline).

        COCO lists a person in the instances file and again, with keypoints, in the keypoints file. Ids cannot identify
        it, since many tools number each file anew.
        """
        self._used.add(new["name"])
        if new.get("segmentation"):
            with suppress(UserError):  # rejected with its row
                self._crowds[flag(new.get("iscrowd"), "iscrowd")] += 1
        key = _object_key(image, new)
        if key is not None and self._before.get(key):
            first = self._before[key][-1]
            what = _content(first)
            for old in self._before[key]:  # a repeat within the earlier file stays equal, to be rejected
                if _content(old) == what:
                    old.update({k: v for k, v in new.items() if v and not old.get(k)})
            self._before[key].pop()
            self.merged += 1
        else:
            image.annotations.append(new)


def _content(annotation: dict[str, Any]) -> dict[str, Any]:
    """What two annotations of one object have in common, the box by value."""
    return {key: value for key, value in annotation.items() if key != "origin"} | {"bbox": numbers(annotation["bbox"])}


def _marks_something(annotation: dict[str, Any]) -> bool:
    """Whether an object has a mask, or a box with an area."""
    box = numbers(annotation["bbox"])
    return bool(annotation["segmentation"]) or (box is not None and len(box) == 4 and min(box[2:]) > 0)


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    """The parts of an object annotation that are read, checked later."""
    attributes = entry.get("attributes")
    kept = {key: entry.get(key) for key in ("bbox", "segmentation", "keypoints", "iscrowd", "area")}
    return kept | {"rotation": (attributes if isinstance(attributes, dict) else entry).get("rotation")}


def _bare_urls_in_two_folders(entries: list[Any]) -> set[str]:
    """Bare names that entries without file name have in two folders of their `coco_url`."""
    folders: dict[str, set[str]] = {}
    for entry in entries:
        if isinstance(entry, dict) and not entry.get("file_name"):
            path = _url_path(entry)
            folders.setdefault(urls.base_name(path), set()).add(path)
    return {name for name, paths in folders.items() if len(paths) > 1}


def _file_name(entry: dict[str, Any], in_two_folders: set[str]) -> str | None:
    """The file name of an image, without one the last component of its `coco_url`, with its folder if that is needed
    to tell two files apart."""
    if entry.get("file_name"):
        return entry["file_name"] if is_file_name(entry["file_name"]) else None
    bare = str(entry.get("coco_url") or "").rpartition("/")[2]
    name = _url_path(entry) if bare in in_two_folders else bare
    return name if is_file_name(name) else None


def _url_path(entry: dict[str, Any]) -> str:
    """Folder and name at the end of a `coco_url`: LVIS has no file names, and its splits mix two folders of COCO."""
    return "/".join(str(entry.get("coco_url") or "").split("/")[3:][-2:])


def _object_key(image: CocoImage, annotation: dict[str, Any]) -> tuple[str, str] | None:
    """Class and place of an object, equal for 109 and 109.0; None if it has neither box nor outline."""
    bbox: Any = annotation.get("bbox")
    outline = annotation.get("segmentation")
    place: dict[str, Any]
    if len(box := numbers(bbox) or []) == 4:
        place = {"bbox": [round(float(c), 2) for c in box]}
    elif not bbox and outline:
        place = {"segmentation": outline}
    else:
        return None
    return image.file_name, json.dumps([annotation["name"], place])
