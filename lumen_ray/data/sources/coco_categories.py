"""The categories of COCO and panoptic json files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.values import id_key, name_text, numbers
from lumen_ray.errors import UserError


def merge_categories(path: str, data: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Adds the file's categories to `known`; returns their names by id."""
    names: dict[str, str] = {}
    entries = data.get("categories") or []
    if not isinstance(entries, list):
        raise UserError(f"'{urls.shown(path)}': categories must be a list", "invalid_annotations")
    for entry in entries:
        named = isinstance(entry, dict) and name_text(entry.get("name"))
        key = id_key(entry.get("id")) if named else None
        if key is None:
            raise UserError(
                f"'{urls.shown(path)}': a category needs 'id' and 'name', got {short_entry(entry)}",
                "invalid_annotations",
            )
        try:
            new = _category(entry)
        except UserError as error:
            raise UserError(f"'{urls.shown(path)}': category '{entry['name']}': {error}", error.reason) from None
        if names.setdefault(key, new["name"]) != new["name"]:
            raise UserError(
                f"'{urls.shown(path)}': category id {key} stands for '{names[key]}' and '{new['name']}'; give each "
                "category an id of its own",
                "invalid_annotations",
            )
        old = known.setdefault(new["name"], new)
        if not old["keypoints"]:
            old.update(keypoints=new["keypoints"], skeleton=new["skeleton"])
        elif new["keypoints"] and new["keypoints"] != old["keypoints"]:
            raise UserError(
                f"'{urls.shown(path)}': category '{new['name']}' has other keypoints than in an earlier file; "
                "prepare files with different keypoints separately",
                "invalid_annotations",
            )
    return names


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
    return {"name": name_text(entry["name"]), "keypoints": keypoints, "skeleton": edges}


def _is_edge(edge: Any, num_keypoints: int) -> bool:
    ends = numbers(edge)
    return ends is not None and len(ends) == 2 and all(int(i) == i and 1 <= i <= num_keypoints for i in ends)


def category_names(ids: Any, names: dict[str, str]) -> tuple[list[str], bool]:
    """(names of the category ids that are listed, whether one of them is unknown)."""
    if not isinstance(ids, list):
        return [], ids is not None
    found = [names.get(id_key(i) or "") for i in ids]
    return [name for name in found if name is not None], None in found


def short_entry(entry: Any) -> str:
    """An entry of a list of categories for a message."""
    return repr(entry)[:160].encode("utf-8", "backslashreplace").decode()


def unused_parents(categories: Iterable[Any], used: Iterable[str]) -> list[str]:
    """Names of categories that no annotation uses and that other categories name as their `supercategory`.

    Roboflow writes such a root over all classes of a project. One that only names itself, as COCO's person does, is an
    ordinary class.
    """
    entries = [entry for entry in categories if isinstance(entry, dict)]
    names = dict.fromkeys(name for entry in entries if (name := name_text(entry.get("name"))) is not None)
    parents = set()
    for entry in entries:
        parent = (name_text(entry.get("supercategory")) or "").casefold()
        if parent != (name_text(entry.get("name")) or "").casefold():
            parents.add(parent)
    in_use = set(used)
    return [name for name in names if name.casefold() in parents and name not in in_use]


def unused_parents_note(names: Sequence[str]) -> str:
    """The sentence about classes that `unused_parents` left out."""
    listed = ", ".join(f"'{name}'" for name in names)
    return (
        f"left out as no class: {listed}; no annotation uses {'it' if len(names) == 1 else 'them'}, and other "
        "categories name it as their supercategory"
    )
