"""Reads a YOLO ``data.yaml``: the images of its splits, class names, keypoint names."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from lumen_ray.data import files, urls
from lumen_ray.data.sources.base import Rejected, reject
from lumen_ray.errors import UserError, suggest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def read(location: str) -> dict[str, Any]:
    """The settings of a data.yaml. Raises `UserError` if it is not valid."""
    try:
        settings = yaml.safe_load(files.read_text(location))
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise UserError(f"'{urls.shown(location)}' is not valid yaml: {why}", "invalid_annotations") from None
    if not isinstance(settings, dict):
        raise UserError(f"'{urls.shown(location)}' must contain settings such as 'train' and 'names'",
                        "invalid_annotations")  # fmt: skip
    return settings


def folder_images(folder: str) -> list[tuple[str, str]]:
    """(image id, location) of the images below a folder; ids are paths relative to it."""
    return [(name, urls.join(folder, name)) for name in files.list_files(folder, SUFFIXES, recursive=True)]


def split_images(data: str, settings: dict[str, Any], split: str) -> tuple[list[tuple[str, str]], list[Rejected]]:
    """(image id, location) of the images of a split, from its folders or from text files that list them, and rejected
    repeats.

    Ids are paths relative to the folder, prefixed by as much of the folder's path as distinguishes it from the split's
    other folders.
    """
    value = settings.get(split)
    if not value:
        splits = [name for name in ("train", "val", "test") if settings.get(name)]
        raise UserError(f"'{urls.shown(data)}' has no split '{split}';{suggest(split, splits)} "
                        f"splits: {', '.join(splits) or 'none'}", "unknown_split")  # fmt: skip
    places = [str(v) for v in (value if isinstance(value, list) else [value])]
    found = [_find(data, str(settings.get("path") or ""), place) for place in places]
    folders = [place for place in found if files.is_dir(place)]
    lists = [place for place in found if place not in folders]
    names = _distinct_names(folders)
    images = [
        (f"{names[folder]}/{name}" if len(places) > 1 else name, path, names[folder])
        for folder in folders
        for name, path in folder_images(folder)
    ]
    homes = _distinct_names(map(urls.parent, lists))
    for place in lists:
        images += _listed_images(place, _root(data, settings), homes)
    return _without_repeats(images)


def _listed_images(place: str, root: str, homes: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(image id, location, origin) of the lines of a text file; `homes`: names of the lists' folders."""
    for number, line in enumerate(files.read_text(place).splitlines(), start=1):
        name, origin = line.strip(), f"{urls.base_name(place)} line {number}"
        if name.startswith("./"):  # relative to the folder of the list, as in ultralytics
            home, name = urls.parent(place), name.removeprefix("./")
            prefix = f"{homes[home]}/" if len(homes) > 1 else ""
            yield prefix + name, _normal(urls.join(home, name)), origin
        elif name:
            yield name, _normal(urls.join(root, name)), origin


def _distinct_names(folders: Iterable[str]) -> dict[str, str]:
    """Each folder's name, with as many parent folders as it takes to make all names distinct."""
    paths = {folder: urls.shown(folder).strip("/").split("/") for folder in folders}
    for depth in range(1, max(map(len, paths.values()), default=0) + 1):
        names = {folder: "/".join(path[-depth:]) for folder, path in paths.items()}
        if len(set(names.values())) == len(names):
            return names
    return {folder: "/".join(path) for folder, path in paths.items()}


def _without_repeats(images: Iterable[tuple[str, str, str]]) -> tuple[list[tuple[str, str]], list[Rejected]]:
    """(image id, location) of each image once; a repeated location or id is rejected."""
    by_id: dict[str, str] = {}
    locations: set[str] = set()
    rejected = []
    for image_id, path, origin in images:
        if path in locations:
            rejected.append(reject("images", image_id, origin, "the split lists this image twice"))
        elif image_id in by_id:
            reason = f"the split lists another image of this name before, '{urls.shown(by_id[image_id])}'"
            rejected.append(reject("images", image_id, origin, reason))
        else:
            by_id[image_id] = path
            locations.add(path)
    return sorted(by_id.items()), rejected


def _root(data: str, settings: dict[str, Any]) -> str:
    home = urls.parent(data)
    root = urls.join(home, str(settings.get("path") or ""))
    return root if files.is_dir(root) else home


def _find(data: str, root: str, place: str) -> str:
    """The location of a folder or file named in the yaml: below its `path`, beside the yaml, or, as some sites export
    it, with one '../' too many."""
    home = urls.parent(data)
    tried = [urls.join(home, root, place), urls.join(home, place), urls.join(home, place.removeprefix("../"))]
    for location in map(_normal, tried):
        if files.exists(location):
            return location
    raise UserError(f"'{urls.shown(data)}' names '{place}', which is not at '{urls.shown(_normal(tried[0]))}'",
                    "missing_images")  # fmt: skip


def _normal(location: str) -> str:
    return urls.map_path(location, posixpath.normpath)


def class_names(where: str, settings: dict[str, Any]) -> list[str]:
    """Class names by number."""
    names = settings.get("names")
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(str(n).strip() for n in names):
        raise UserError(f"'{urls.shown(where)}' needs class names, as a list or numbered from 0", "invalid_classes")
    names = [" ".join(str(name).split()) for name in names]
    if len(set(names)) < len(names):
        raise UserError(f"'{urls.shown(where)}' names a class twice; class names must differ", "invalid_classes")
    if settings.get("nc") not in (None, len(names)):
        raise UserError(f"'{urls.shown(where)}' says nc: {settings['nc']} but names {len(names)} classes",
                        "invalid_classes")  # fmt: skip
    return names


def keypoint_names(settings: dict[str, Any], classes: int) -> tuple[list[int] | None, list[list[str]]]:
    """`kpt_shape` and the keypoint names of each class; None and empty lists if the yaml has none."""
    shape = settings.get("kpt_shape")
    if shape is None:
        return None, [[] for _ in range(classes)]
    if not _is_keypoint_shape(shape):
        raise UserError(f"kpt_shape must be [number of keypoints, 2 or 3], got {shape}", "invalid_keypoints")
    named, count = settings.get("kpt_names"), shape[0]
    by_class = [named.get(i) if isinstance(named, dict) else named for i in range(classes)]
    default = _default_names(settings.get("flip_idx"), count)
    names = [default if n is None else n for n in by_class]
    if not all(isinstance(n, list) and len(n) == count and len({str(p).strip() for p in n} - {""}) == count
               for n in names):  # fmt: skip
        raise UserError(f"kpt_names must be {count} different names (for each class)", "invalid_keypoints")
    return shape, [[str(point).strip() for point in n] for n in names]


def _is_keypoint_shape(shape: Any) -> bool:
    """Whether it is [number of keypoints, 2 or 3]."""
    pair = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    return pair and shape[0] > 0 and shape[1] in (2, 3)


def _default_names(flip: Any, count: int) -> list[str]:
    """Names whose left and right are exchanged exactly as by `flip_idx`."""
    flip = flip or list(range(count))
    if not isinstance(flip, list) or sorted(map(str, flip)) != sorted(map(str, range(count))):
        raise UserError(f"flip_idx must contain each of 0..{count - 1} once, got {flip}", "invalid_keypoints")
    names = [f"point {i + 1}" for i in range(count)]
    pairs = [(i, other) for i, other in enumerate(flip) if i < other]
    if any(flip[flip[i]] != i for i in range(count)):
        raise UserError(f"flip_idx must exchange pairs, got {flip}", "invalid_keypoints")
    for k, (first, second) in enumerate(pairs, start=1):
        names[first], names[second] = f"left point {k}", f"right point {k}"
    return names
