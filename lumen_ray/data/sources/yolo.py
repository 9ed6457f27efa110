"""YOLO text labels: boxes, segment polygons and poses, from a ``data.yaml`` or from folders and a list of classes.

One line per object: ``class cx cy w h``; ``class x1 y1 x2 y2 x3 y3 ...`` (a polygon, whose tight box is used); or, if
the yaml has ``kpt_shape: [K, 2 or 3]``, ``class cx cy w h`` and K keypoints. Numbers are fractions of the sides of the
**EXIF-rotated** image, as in ultralytics. As there, an image whose label file is empty or missing is a negative example
for every class; only if all label files are missing is their folder taken to be wrong.

Keypoints: with 2 numbers each, those at (0, 0) or below are unlabelled, all others visible. Names are the yaml's
``kpt_names`` (a list, or by class number); otherwise those that ``flip_idx`` exchanges become "left point k" and "right
point k" (k numbers the pairs), the others "point k", so that mirroring exchanges them correctly.

Numbers outside 0..1 by more than 0.01 and repeated lines are rejected; smaller excesses are clipped.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.frames import read_frame
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.sources import yolo_yaml
from lumen_ray.data.sources.base import (
    Listing,
    Outcome,
    Rejected,
    Source,
    instance,
    lost_image,
    perception_tasks,
    read_first,
    reject,
)
from lumen_ray.data.sources.record_parsing import reserved_token, to_box, to_mask
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
        rejected: Sequence[Rejected] = ()
        if self.data:
            settings = yolo_yaml.read(self.data)
            images, rejected = yolo_yaml.split_images(self.data, settings, self.split)
        else:
            assert self.images is not None and self.classes is not None, "checked in __post_init__"
            lines = files.read_text(self.classes).splitlines()
            settings = {"names": [line.strip() for line in lines if line.strip()]}
            images = yolo_yaml.folder_images(self.images)
        if not images:
            raise UserError(f"'{urls.shown(self.data or self.images or '')}' lists no images", "empty_input")
        names = yolo_yaml.class_names(self.data or self.classes or "", settings)
        shape, points = yolo_yaml.keypoint_names(settings, len(names))
        categories = [{"name": name, "keypoints": p, "skeleton": []} for name, p in zip(names, points, strict=True)]
        records = [[image_id, path, self._label_of(image_id, path)] for image_id, path in images]
        _check_labels([label for _, _, label in records])
        inputs = {"images": len(images) + len(rejected)}
        return Listing(records, inputs, categories, {"names": names, "kpt_shape": shape}, rejected)

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


def _check_labels(labels: Sequence[str]) -> None:
    """Raises `UserError` if no label file exists: all images would become negatives of all classes."""
    by_folder: dict[str, set[str]] = {}
    for label in labels:
        by_folder.setdefault(urls.parent(label), set()).add(urls.base_name(label))
    for folder, names in by_folder.items():  # one listing per folder: a store is slow for single files
        if files.is_dir(folder) and not names.isdisjoint(files.list_files(folder, [".txt"])):
            return
    where, name = urls.shown(urls.parent(labels[0])), urls.base_name(labels[0])
    raise UserError(f"none of {len(labels)} images has a label file in '{where}', such as '{name}'; give --labels "
                    "with their folder, or an empty label file for an image without objects",
                    "missing_annotations")  # fmt: skip


def _outcome(image_id: str, path: str, labels: list[tuple[str, list[str]]], shared: dict[str, Any]) -> Outcome:
    """The outcome of one image; `labels`: (origin, words) of its label lines."""
    came_in = {"annotations": len(labels)}
    try:
        data = read_first(path)
        size = read_frame(data, []).rotated_size
    except UserError as error:
        lost = lost_image(image_id, urls.base_name(path), error, origins=[origin for origin, _ in labels])
        return replace(lost, came_in=came_in)
    outcome, instances, incomplete = Outcome(came_in=came_in), [], set()
    seen: set[tuple[str, ...]] = set()
    for origin, words in labels:
        if tuple(words) in seen:
            outcome.rejected.append(reject("annotations", image_id, origin, "it repeats an earlier line"))
            continue
        seen.add(tuple(words))
        try:
            instances.append(_instance(words, shared["names"], shared["kpt_shape"], size))
        except UserError as error:
            outcome.rejected.append(reject("annotations", image_id, origin, error))
            name = _named(words, shared["names"])
            incomplete |= set(shared["names"]) if name is None else {name}  # it could have been any class
    classes = [c for c in shared["names"] if c not in incomplete and not reserved_token(c)]
    outcome.written = {"annotations": len(instances)}
    outcome.row = make_row(image_id, data, size, YoloSource.kind, instances=instances, classes=classes,
                           tasks=perception_tasks(classes, instances))  # fmt: skip
    return outcome


def _named(words: Sequence[str], names: Sequence[str]) -> str | None:
    """The class of a line, None if its number is not a class."""
    try:
        number = float(words[0])
    except ValueError:
        return None
    return names[int(number)] if number in range(len(names)) else None


def _instance(words: Sequence[str], names: Sequence[str], shape: Sequence[int] | None, size: Size) -> dict[str, Any]:
    name = _named(words, names)
    if name is None:
        raise UserError(f"class '{words[0][:20]}' is not one of 0..{len(names) - 1}", "unknown_category")
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError:
        raise UserError("it contains words that are not numbers", "invalid_annotations") from None
    if shape:
        count, dims = shape
        if len(numbers) != 4 + count * dims:
            raise UserError(f"a pose line needs {5 + count * dims} numbers (kpt_shape {list(shape)}), "
                            f"got {len(words)}", "invalid_keypoints")  # fmt: skip
        box = _box(_inside(numbers[:4]), size)
        return instance(name, box, keypoints=_keypoints(numbers[4:], dims, size))
    if len(numbers) == 4:
        return instance(name, _box(_inside(numbers), size))
    if len(numbers) < 6 or len(numbers) % 2:
        raise UserError(f"a line needs a class and 4 numbers (box), or 3 or more points, got {len(words)} numbers",
                        "invalid_annotations")  # fmt: skip
    height, width = size
    xs, ys = ([v * side for v in _inside(numbers)[start::2]] for start, side in ((0, width), (1, height)))
    mask = to_mask([[c for point in zip(xs, ys, strict=True) for c in point]], size)
    return instance(name, to_box([min(xs), min(ys), max(xs), max(ys)], "xyxy", size), mask=mask)


def _inside(numbers: list[float]) -> list[float]:
    """The numbers clipped to 0..1. Raises `UserError` if one is outside by more than `_TOLERANCE` or not finite."""
    if not all(math.isfinite(v) and -_TOLERANCE <= v <= 1 + _TOLERANCE for v in numbers):
        raise UserError("its numbers must be fractions of the image's sides, 0..1; are they pixels?", "invalid_box")
    return [min(max(v, 0.0), 1.0) for v in numbers]


def _box(numbers: Sequence[float], size: Size) -> list[float]:
    (height, width), (cx, cy, w, h) = size, numbers
    return to_box([(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height], "xywh", size)


def _keypoints(numbers: Sequence[float], dims: int, size: Size) -> list[float] | None:
    """Flat x, y, v in pixels; None if none is labelled."""
    points: list[float] = []
    for x, y, *visible in (numbers[i : i + dims] for i in range(0, len(numbers), dims)):
        v = visible[0] if visible else _VISIBLE * (x >= 0 and y >= 0 and (x, y) != (0, 0))
        if v not in (0, 1, 2):
            raise UserError(f"the visibility of a keypoint must be 0, 1 or 2, got {v}", "invalid_keypoints")
        x, y = _inside([x, y]) if v else (0.0, 0.0)
        points += [x * size[1], y * size[0], float(v)]
    return points if any(points[2::3]) else None
