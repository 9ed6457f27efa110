"""Reads a YOLO ``data.yaml``: the images of its splits, class names, keypoint names."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from lumen_ray.data import files, urls
from lumen_ray.data.pictures import distinct_names, left_out_note, list_pictures, spellings
from lumen_ray.data.sources.base import Rejected, reject
from lumen_ray.data.values import id_key, whole
from lumen_ray.errors import UserError, suggest

Listed = tuple[list[tuple[str, str]], list[str]]  # (image id, location) of images, and notes about the folder


def read(location: str) -> dict[str, Any]:
    """The settings of a data.yaml. Raises `UserError` if it is not valid.

    Scalars stay texts: yaml would turn the class names yes, no, on and off into booleans, and 010 into 8.
    """
    try:
        settings = yaml.load(files.read_text(location), yaml.BaseLoader)  # noqa: S506  it makes only texts, lists, dicts
    except (yaml.YAMLError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"'{urls.shown(location)}' is not valid yaml: {why}", "invalid_annotations") from None
    if not isinstance(settings, dict):
        raise UserError(f"'{urls.shown(location)}' must contain settings such as 'train' and 'names'",
                        "invalid_annotations")  # fmt: skip
    return settings


def folder_images(folder: str) -> Listed:
    """The images below a folder; ids are paths relative to it."""
    names, others = list_pictures(folder)
    del others[".txt"]  # labels may lie beside their images
    note = left_out_note(others, urls.base_name(folder))
    return [(name, urls.join(folder, name)) for name in names], [note] if note else []


def split_images(
    data: str, settings: dict[str, Any], split: str
) -> tuple[list[tuple[str, str]], list[Rejected], list[str]]:
    """(image id, location) of the images of a split, from its folders or from text files that list them, rejected
    repeats, and notes.

    Ids are paths relative to the folder, prefixed by as much of the folder's path as distinguishes it from the split's
    other folders.
    """
    value = _given(settings, split)
    if not value:
        splits = [name for name in ("train", "val", "test") if _given(settings, name)]
        raise UserError(f"'{urls.shown(data)}' has no split '{split}';{suggest(split, splits)} "
                        f"splits: {', '.join(splits) or 'none'}", "unknown_split")  # fmt: skip
    places = [str(v) for v in (value if isinstance(value, list) else [value])]
    found = [_find(data, str(_given(settings, "path") or ""), place) for place in places]
    folders = [place for place in found if files.is_dir(place)]
    lists = [place for place in found if place not in folders]
    names = distinct_names(folders)
    images: list[tuple[str, str, str]] = []
    notes: list[str] = []
    for folder in folders:
        below, more = folder_images(folder)
        notes += more
        prefix = f"{names[folder]}/" if len(places) > 1 else ""
        images += [(prefix + name, path, names[folder]) for name, path in below]
    homes = distinct_names(map(urls.parent, lists))
    for place in lists:
        images += _listed_images(place, _root(data, settings), homes)
    return *_without_repeats(images), notes


def _given(settings: dict[str, Any], key: str) -> Any:
    """The value under a key, None for an empty one."""
    value = settings.get(key)
    return None if value in ("", "~", "null", "Null", "NULL") else value


def _listed_images(place: str, root: str, homes: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(image id, location, origin) of the lines of a text file; `homes`: names of the lists' folders."""
    there: dict[str, set[str]] = {}  # folder -> names of its files
    for number, line in enumerate(files.read_text(place).splitlines(), start=1):
        # Windows tools write backslashes
        name, origin = line.strip().replace("\\", "/"), f"{urls.base_name(place)} line {number}"
        if name.startswith("./"):  # relative to the folder of the list, as in ultralytics
            home, name = urls.parent(place), name.removeprefix("./")
            prefix = f"{homes[home]}/" if len(homes) > 1 else ""
            yield prefix + name, _spelled(_normal(urls.join(home, name)), there), origin
        elif name:
            yield name, _spelled(_normal(urls.join(root, name)), there), origin


def _spelled(location: str, there: dict[str, set[str]]) -> str:
    """The location, with its file name in the only similar spelling that exists if it does not exist itself."""
    folder, name = urls.parent(location), urls.base_name(location)
    if folder not in there:
        there[folder] = set(files.list_files(folder)) if files.is_dir(folder) else set()
    if name in there[folder]:
        return location
    similar = [spelling for spelling in spellings(name) if spelling in there[folder]]
    return urls.join(folder, similar[0]) if len(similar) == 1 else location


def _without_repeats(images: Iterable[tuple[str, str, str]]) -> tuple[list[tuple[str, str]], list[Rejected]]:
    """(image id, location) of each image once; a repeated location or id is rejected."""
    by_id: dict[str, str] = {}
    locations: set[str] = set()
    rejected = []
    for image_id, path, origin in images:
        if path in locations:
            error = UserError("the split lists this image twice", "repeated")
            rejected.append(reject("images", image_id, origin, error))
        elif image_id in by_id:
            why = f"the split lists another image of this name before, '{urls.shown(by_id[image_id])}'"
            rejected.append(reject("images", image_id, origin, UserError(why, "repeated_image")))
        else:
            by_id[image_id] = path
            locations.add(path)
    return sorted(by_id.items()), rejected


def _root(data: str, settings: dict[str, Any]) -> str:
    home = urls.parent(data)
    root = urls.join(home, str(_given(settings, "path") or ""))
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
    if isinstance(names, dict):
        numbered = {id_key(key): name for key, name in names.items()}
        names = [numbered.get(str(i)) for i in range(len(names))] if len(numbered) == len(names) else None
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        names = None
    if not isinstance(names, list) or not names or not all(str(n).strip() for n in names):
        raise UserError(f"'{urls.shown(where)}' needs class names, as a list or numbered from 0", "invalid_classes")
    names = [" ".join(str(name).split()) for name in names]
    if len(set(names)) < len(names):
        raise UserError(f"'{urls.shown(where)}' names a class twice; class names must differ", "invalid_classes")
    if (count := _given(settings, "nc")) is not None and whole(count) != len(names):
        raise UserError(f"'{urls.shown(where)}' says nc: {count} but names {len(names)} classes",
                        "invalid_classes")  # fmt: skip
    return names


def keypoint_names(settings: dict[str, Any], classes: int) -> tuple[list[int] | None, list[list[str]]]:
    """`kpt_shape` and the keypoint names of each class; None and empty lists if the yaml has none."""
    given = _given(settings, "kpt_shape")
    if given is None:
        return None, [[] for _ in range(classes)]
    shape = _keypoint_shape(given)
    named, count = _given(settings, "kpt_names"), shape[0]
    if isinstance(named, dict):
        named = {id_key(key): value for key, value in named.items()}
    by_class = [named.get(str(i)) if isinstance(named, dict) else named for i in range(classes)]
    default = _default_names(_given(settings, "flip_idx"), count)
    names = [default if n is None else n for n in by_class]
    if not all(isinstance(n, list) and len(n) == count and len({str(p).strip() for p in n} - {""}) == count
               for n in names):  # fmt: skip
        raise UserError(f"kpt_names must be {count} different names (for each class)", "invalid_keypoints")
    return shape, [[str(point).strip() for point in n] for n in names]


def _keypoint_shape(value: Any) -> list[int]:
    """[number of keypoints, 2 or 3]. Raises `UserError` for anything else."""
    shape = [whole(n) for n in value] if isinstance(value, list) else []
    count, dims = shape if len(shape) == 2 else (None, None)
    if count is None or count < 1 or dims not in (2, 3):
        raise UserError(f"kpt_shape must be [number of keypoints, 2 or 3], got {value}", "invalid_keypoints")
    return [count, dims]


def _default_names(given: Any, count: int) -> list[str]:
    """Names whose left and right are exchanged exactly as by `flip_idx`."""
    flip = [whole(i) for i in given] if isinstance(given, list) and given else list(range(count))
    if (given and not isinstance(given, list)) or set(flip) != set(range(count)) or len(flip) != count:
        raise UserError(f"flip_idx must contain each of 0..{count - 1} once, got {given}", "invalid_keypoints")
    flip = [int(i) for i in flip if i is not None]
    names = [f"point {i + 1}" for i in range(count)]
    pairs = [(i, other) for i, other in enumerate(flip) if i < other]
    if any(flip[flip[i]] != i for i in range(count)):
        raise UserError(f"flip_idx must exchange pairs, got {given}", "invalid_keypoints")
    for k, (first, second) in enumerate(pairs, start=1):
        names[first], names[second] = f"left point {k}", f"right point {k}"
    return names
