"""Joins shard folders into one, which a recipe can train over: its plan draws from a single folder.

The files are copied under new names and not rewritten. The manifest is written last, so that a killed job leaves no
folder that can be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.shards import shards
from lumen_ray.errors import UserError


def join(folders: Sequence[urls.Location], output: urls.Location) -> dict[str, Any]:
    """Writes the rows of all `folders` into the shard folder `output` (local or a URL); returns its manifest.

    Raises `UserError` if the output holds shards, if an image id occurs twice, or if a class has other keypoints in
    another folder.
    """
    output = urls.absolute(output)
    if files.is_file(urls.join(output, shards.MANIFEST)):
        raise UserError(f"'{urls.shown(output)}' already contains shards; give a new folder", "output_exists")
    manifests = [shards.read_manifest(folder) for folder in folders]
    categories = _categories(manifests)
    _check_ids(folders)
    files.make_folder(output)
    entries = []
    for number, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
        for entry in manifest["files"]:
            name = f"{number}-{entry['path']}"
            files.write_bytes(
                urls.join(output, name), files.read_bytes(urls.join(urls.absolute(folder), entry["path"]))
            )
            entries.append({**entry, "path": name})
    manifest = _manifest(manifests, categories, entries)
    shards.write_manifest(output, manifest)
    return manifest


def _categories(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes of all manifests, each with the sum of its images."""
    joined: dict[str, dict[str, Any]] = {}
    for category in (category for manifest in manifests for category in manifest["categories"]):
        known = joined.setdefault(category["name"], {**category, "images": 0})
        for key in ("keypoints", "skeleton"):
            if known.get(key) != category.get(key):
                raise UserError(
                    f"class '{category['name']}' has another {key} in one of the folders; rename it in one of them",
                    "different_classes",
                )
        known["images"] += category.get("images", 0)
    return list(joined.values())


def _check_ids(folders: Sequence[urls.Location]) -> None:
    seen: set[str] = set()
    for folder in folders:
        for row in shards.read_rows(folder, ["image_id"]):
            if row["image_id"] in seen:
                raise UserError(
                    f"image id '{row['image_id']}' occurs twice, again in '{urls.shown(folder)}'; join folders of "
                    "different images",
                    "repeated_id",
                )
            seen.add(row["image_id"])


def _manifest(
    manifests: Sequence[dict[str, Any]], categories: list[dict[str, Any]], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest of the joined files, whose counts are the sums of the folders'."""
    tasks, changed = Counter[str](), Counter[str]()
    counts: dict[str, Counter[str]] = {}
    named: dict[str, list[str]] = {}
    for manifest in manifests:
        tasks.update(manifest["tasks"])
        changed.update(manifest.get("changed", {}))
        for kind, count in manifest.get("counts", {}).items():
            counts.setdefault(kind, Counter()).update(count)
        for change, names in manifest.get("changed_in", {}).items():
            named.setdefault(change, []).extend(names)
    links = sum(manifest.get("links", 0) for manifest in manifests)
    return {
        "schema_version": shards.SCHEMA_VERSION,
        "rows": sum(entry["rows"] for entry in entries),
        "tasks": dict(sorted(tasks.items())),
        "categories": categories,
        "counts": {kind: dict(count) for kind, count in counts.items()},
        "rejected": sum(manifest.get("rejected", 0) for manifest in manifests),
        "changed": dict(sorted(changed.items())),
        "changed_in": dict(sorted(named.items())),
        "untrained": sum(manifest.get("untrained", 0) for manifest in manifests),
        **({"links": links} if links else {}),
        "notes": list(dict.fromkeys(note for manifest in manifests for note in manifest.get("notes", []))),
        "origin": {"kind": "joined", "parts": [manifest.get("origin", {}) for manifest in manifests]},
        "files": entries,
    }
