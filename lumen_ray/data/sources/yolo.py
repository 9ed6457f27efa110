"""YOLO text labels: boxes, segment polygons and poses, from a ``data.yaml`` or from folders and a list of classes.

One line per object: ``class cx cy w h``; ``class x1 y1 x2 y2 x3 y3 ...`` (a polygon, whose tight box is used); or, if
the yaml has ``kpt_shape: [K, 2 or 3]``, ``class cx cy w h`` and K keypoints. Numbers are fractions of the sides of the
**EXIF-rotated** image, as in ultralytics. As there, an image whose label file is empty or missing is a negative example
for every class; only if all label files are missing is their folder taken to be wrong.

Keypoints: with 2 numbers each, those at (0, 0) or below are unlabelled, all others visible. Names are the yaml's
``kpt_names`` (a list, or by class number); otherwise those that ``flip_idx`` exchanges become "left point k" and "right
point k" (k numbers the pairs), the others "point k", so that mirroring exchanges them correctly.

Numbers outside 0..1 by more than 0.01 and repeated objects (0.50 is 0.5) are rejected; smaller excesses are clipped.
Images that share a label file, as a.jpg and a.png do, are rejected: the labels belong to one of them.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.frames import read_frame
from lumen_ray.data.pictures import is_picture, spellings
from lumen_ray.data.sources import yolo_yaml
from lumen_ray.data.sources.base import Listing, Outcome, Rejected, Source, lost_image, reject
from lumen_ray.data.sources.objects import ObjectList
from lumen_ray.data.values import number
from lumen_ray.errors import UserError
from lumen_ray.structures import Size

_TOLERANCE = 0.01  # of the image's sides
_VISIBLE = 2.0


@dataclass
class YoloSource(Source):
    """Either `data` (a data.yaml) and its `split`; or `images`, `labels` (folders) and `classes` (a text file, one name
    per line). By default, label paths are the images' with a folder ``labels`` in place of ``images``."""

    data: str | None = None
    split: str = "train"
    images: str | None = None
    labels: str | None = None
    classes: str | None = None
    kind = "yolo"

    def __post_init__(self) -> None:
        for name in ("data", "images", "labels", "classes"):
            value = getattr(self, name)
            setattr(self, name, value and urls.absolute(value))
        if (self.data is None) == (self.images is None):
            raise UserError("give either --data with a data.yaml, or --images and --classes", "invalid_config")
        if self.images and not self.classes:
            raise UserError("--images also needs --classes, a text file with one class name per line", "invalid_config")

    def read_listing(self) -> Listing:
        if self.labels and not files.is_dir(self.labels):
            raise UserError(f"labels folder '{urls.shown(self.labels)}' does not exist; give --labels with the folder "
                            "of the label files", "missing_folder")  # fmt: skip
        rejected: list[Rejected] = []
        if self.data:
            settings = yolo_yaml.read(self.data)
            images, rejected, notes = yolo_yaml.split_images(self.data, settings, self.split)
        else:
            assert self.images is not None and self.classes is not None, "checked in __post_init__"
            settings = {"names": _class_lines(self.classes)}
            images, notes = yolo_yaml.folder_images(self.images)
        if not images:
            raise UserError(f"'{urls.shown(self.data or self.images or '')}' lists no images", "empty_input")
        names = yolo_yaml.class_names(self.data or self.classes or "", settings)
        shape, points = yolo_yaml.keypoint_names(settings, len(names))
        categories = [{"name": name, "keypoints": p, "skeleton": []} for name, p in zip(names, points, strict=True)]
        inputs = {"images": len(images) + len(rejected)}
        found = _find_labels([self._label_of(image_id, path) for image_id, path in images], [p for _, p in images])
        notes += found.notes()
        records = []
        for (image_id, path), label in zip(images, found.locations, strict=True):
            error = found.error(label, image_id)
            if error is not None:
                rejected.append(reject("images", image_id, image_id, error))
            else:
                records.append([image_id, path, label])
        return Listing(records, inputs, categories, {"names": names, "kpt_shape": shape}, rejected, notes=notes)

    def _label_of(self, image_id: str, path: str) -> str:
        """The location of an image's label file."""
        if self.labels:
            return urls.join(self.labels, posixpath.splitext(image_id)[0] + ".txt")

        def beside(path: str) -> str:
            return posixpath.splitext("/labels/".join(path.rsplit("/images/", 1)))[0] + ".txt"

        return urls.map_path(path, beside)

    def rows(self, record: list[str], shared: dict[str, Any]) -> Iterator[Outcome]:
        image_id, path, label = record
        where = urls.base_name(label)
        try:
            lines = files.read_text(label).splitlines() if files.is_file(label) else []
        except UserError as error:
            yield Outcome(rejected=[reject("images", image_id, where, error)])
            return
        labels = [(f"{where} line {n}", line.split()) for n, line in enumerate(lines, start=1) if line.strip()]
        yield _outcome(image_id, path, labels, shared)


#: text files in folders of labels that are none
_NO_LABELS = {"classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "readme.txt", "notes.txt", "labels.txt"}


def _class_lines(location: str) -> list[str]:
    """The class names of a text file, one per line. Raises `UserError` for a blank line between them, since the number
    of a class is that of its line."""
    lines = [line.strip() for line in files.read_text(location).rstrip().splitlines()]
    if "" in lines:
        raise UserError(
            f"line {lines.index('') + 1} of '{urls.shown(location)}' is blank; a class's number is that of its line, "
            "so name the class or remove the line",
            "invalid_classes",
        )
    return lines


@dataclass
class _Labels:
    """The label files of the images. `locations`: of each image's, existing or not; `existing`: folder -> names there;
    `unclaimed`: folder -> names that belong to no image."""

    locations: list[str]
    existing: dict[str, set[str]]
    unclaimed: dict[str, list[str]]

    def __post_init__(self) -> None:
        self._times = Counter(self.locations)
        self._with_labels = {urls.parent(label) for label in self.locations if self._exists(label)}

    def _exists(self, label: str) -> bool:
        return urls.base_name(label) in self.existing[urls.parent(label)]

    def notes(self) -> list[str]:
        found = []
        unused = [name for names in self.unclaimed.values() for name in names]
        if unused:
            listed = ", ".join(f"'{name}'" for name in unused[:3]) + (", ..." if len(unused) > 3 else "")
            found.append(f"{len(unused)} label files belong to no image that is read: {listed}")
        for folder, images in Counter(map(urls.parent, self.locations)).items():
            if folder not in self._with_labels:
                found.append(
                    f"none of {images} images has its label file in '{urls.shown(folder)}': they are read as images "
                    "without objects"
                )
        return found

    def error(self, label: str, image_id: str) -> UserError | None:
        """Why an image cannot be used with its label file. Without one it is a negative example, unless its labels are
        likely to be elsewhere."""
        name, folder = urls.base_name(label), urls.parent(label)
        if self._times[label] > 1:
            return UserError(f"it shares its label file '{name}' with other images", "ambiguous_label")
        if self._exists(label):
            return None
        if unclaimed := self.unclaimed[folder]:
            why = f"it has no label file '{name}', but '{unclaimed[0]}' beside it belongs to no image"
            return UserError(why, "missing_labels")
        return None


def _find_labels(labels: Sequence[str], images: Sequence[str]) -> _Labels:
    """The label files of `images`, whose locations should be `labels`.

    A label file that exists only in another spelling (suffix case, Unicode form) is taken if no other image has it:
    an image without label file would become a negative of all classes. Raises `UserError` if no label file exists.
    """
    existing: dict[str, set[str]] = {}
    for folder in {urls.parent(label) for label in labels}:  # one listing per folder: a store is slow for single files
        there = files.list_files(folder, [".txt"]) if files.is_dir(folder) else []
        existing[folder] = {name for name in there if not name.startswith(".")}
    exact = {label for label in labels if urls.base_name(label) in existing[urls.parent(label)]}
    guesses: dict[str, str] = {}
    for label in set(labels) - exact:
        folder, name = urls.parent(label), urls.base_name(label)
        similar = {s for s in spellings(name) if s in existing[folder] and urls.join(folder, s) not in exact}
        if len(similar) == 1:
            guesses[label] = urls.join(folder, similar.pop())
    times = Counter(guesses.values())
    found = [guesses[label] if times[guesses.get(label, "")] == 1 else label for label in labels]
    if not any(urls.base_name(label) in existing[urls.parent(label)] for label in found):
        where, name = urls.shown(urls.parent(labels[0])), urls.base_name(labels[0])
        raise UserError(f"none of {len(labels)} images has a label file in '{where}', such as '{name}'; give --labels "
                        "with their folder, or an empty label file for an image without objects",
                        "missing_annotations")  # fmt: skip
    used = set(found)
    beside: dict[str, set[str]] = {}  # label folder -> folders of its images
    for label, image in zip(labels, images, strict=True):
        beside.setdefault(urls.parent(label), set()).add(urls.parent(image))
    unclaimed = {}
    for folder, names in sorted(existing.items()):
        left = {n for n in names if urls.join(folder, n) not in used and n.lower() not in _NO_LABELS}
        if left:  # those of images that the split does not list are no concern of it
            others = (files.list_files(place) for place in beside[folder] if files.is_dir(place))
            left -= {posixpath.splitext(name)[0] + ".txt" for there in others for name in there if is_picture(name)}
        unclaimed[folder] = sorted(left)
    return _Labels(found, existing, unclaimed)


def _outcome(image_id: str, path: str, labels: list[tuple[str, list[str]]], shared: dict[str, Any]) -> Outcome:
    """The outcome of one image; `labels`: (origin, words) of its label lines."""
    came_in = {"annotations": len(labels)}
    try:
        data = files.read_bytes(path)
        frame = read_frame(data, [])
    except UserError as error:
        lost = lost_image(image_id, urls.base_name(path), error, origins=[origin for origin, _ in labels])
        return replace(lost, came_in=came_in)
    objects = ObjectList(image_id, frame, shared["names"])
    for origin, words in labels:
        name = _named(words, shared["names"])
        try:
            if name is None:
                last = len(shared["names"]) - 1
                raise UserError(f"class '{words[0][:20]}' is not one of 0..{last}", "unknown_category")
            parts = _parts(words, shared["kpt_shape"], frame.size)
        except UserError as error:
            objects.reject(name, origin, error)
        else:
            objects.add(name, origin, box_format="xywh", **parts)
    return replace(objects.outcome(data, YoloSource.kind), came_in=came_in)


def _named(words: Sequence[str], names: Sequence[str]) -> str | None:
    """The class of a line, None if its number is not a class."""
    place = number(words[0])
    return names[int(place)] if place is not None and place in range(len(names)) else None


def _parts(words: Sequence[str], shape: Sequence[int] | None, size: Size) -> dict[str, Any]:
    """Box (xywh in pixels), mask and keypoints of a line."""
    found = [number(word) for word in words[1:]]
    if shape:
        count, dims = shape
        if len(words) - 1 != 4 + count * dims:
            raise UserError(f"a pose line needs {5 + count * dims} numbers (kpt_shape {list(shape)}), "
                            f"got {len(words)}", "label_file")  # fmt: skip
        box = _box(_inside(found[:4]), size)
        return {"bbox": box, "keypoints": _keypoints(found[4:], dims, size), "num_keypoints": count}
    if len(found) == 4:
        return {"bbox": _box(_inside(found), size)}
    if len(found) < 6 or len(found) % 2:
        raise UserError("a line needs a class and 4 numbers (box), or a class and 3 or more points, got a class and "
                        f"{len(found)} numbers; remove confidences and track ids", "label_file")  # fmt: skip
    height, width = size
    xs, ys = ([v * side for v in _inside(found)[start::2]] for start, side in ((0, width), (1, height)))
    corners = [c for point in zip(xs, ys, strict=True) for c in point]
    return {"bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], "segmentation": [corners]}


def _inside(values: Sequence[float | None]) -> list[float]:
    """The numbers clipped to 0..1. Raises `UserError` if one is outside by more than `_TOLERANCE`, or no number."""
    if None in values:
        raise UserError("it contains words that are not numbers", "label_file")
    inside = [min(max(v, 0.0), 1.0) for v in values if v is not None]
    if any(abs(v - w) > _TOLERANCE for v, w in zip(values, inside, strict=True) if v is not None):
        raise UserError("its numbers must be fractions of the image's sides, 0..1; are they pixels?", "invalid_box")
    return inside


def _box(numbers: Sequence[float], size: Size) -> list[float]:
    """Box xywh in pixels from centre and sides as fractions."""
    (height, width), (cx, cy, w, h) = size, numbers
    return [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]


def _keypoints(values: Sequence[float | None], dims: int, size: Size) -> list[float | None]:
    """Flat x, y, v in pixels, to be checked like those of other sources.

    A keypoint outside 0..1 by more than `_TOLERANCE` gets no number, so that it is dropped and counted.
    """
    points: list[float | None] = []
    for place in range(0, len(values), dims):
        x, y, *visible = values[place : place + dims]
        v = (
            visible[0]
            if visible
            else _VISIBLE * (x is not None and y is not None and x >= 0 and y >= 0 and (x, y) != (0, 0))
        )
        try:
            x, y = _inside([x, y]) if v else (0.0, 0.0)
        except UserError:
            points += [None, None, v]
        else:
            points += [x * size[1], y * size[0], v]
    return points
