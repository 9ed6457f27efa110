"""Exports shards to COCO json.

A COCO data set comes back with the same classes, masks and crowd flags, the same captions except for runs of blanks,
and boxes, areas and labelled keypoints as float32, all in the frame of the EXIF-rotated image. Not the same: images,
annotations and categories have new numbers, polygons are RLE, boxes are clipped to the image and keypoints outside it
unlabelled (the manifest's `changed` counts both), unlabelled keypoints have coordinates 0, and repeated or rejected
annotations are missing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.pictures import FileNames
from lumen_ray.data.shards.shards import read_manifest, read_rows
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes

#: extensions by the first bytes of a file, for images whose id has none
_SIGNATURES = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
_SIGNATURES |= {b"II*": ".tif", b"MM\0*": ".tif"}
INSTANCES, CAPTIONS, IMAGES = "instances.json", "captions.json", "images"


def export_coco(shards: urls.Location, output: urls.Location, *, images: bool = False) -> dict[str, int]:
    """Writes ``instances.json`` (and ``captions.json`` if there are captions) into the folder `output`; returns counts.

    Boxes are xywh in float64 without rounding, so that reading them again gives the same float32 corners; masks are
    compressed RLE, skeletons count keypoints from 1. Images and annotations are numbered from 1; `file_name` is the
    row's `image_id`, with an extension added if it has none and a number if an earlier row has that name. If a row is
    not annotated for all classes, the image has LVIS's ``neg_category_ids`` and ``not_exhaustive_category_ids``.
    `images`: also write the encoded images, unchanged, to ``images/``. Rows without an image, and the further images of
    rows with several, are left out and counted under "without_image" and "further_images_left_out". Questions, regions,
    phrases and captions about several images, which COCO does not have, are left out.
    """
    manifest = read_manifest(shards)
    categories = {c["name"]: {"id": n, **_category(c)} for n, c in enumerate(manifest["categories"], start=1)}
    listed: list[dict[str, Any]] = []
    classes: list[tuple[frozenset[str], frozenset[str]]] = []  # per image: annotated exhaustively, present
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    interned: dict[frozenset[str], frozenset[str]] = {}  # one copy of the sets that most rows share
    skipped = {"without_image": 0, "further_images_left_out": 0}
    names = FileNames()
    files.make_folder(output)
    for row in read_rows(shards):
        skipped["further_images_left_out"] += len(row["further_images"])
        if row["image"] is None:
            skipped["without_image"] += 1
            continue
        number = len(listed) + 1
        for instance in row["instances"]:
            name = instance["phrase"]
            category = categories.setdefault(name, {"id": len(categories) + 1, "name": name})
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(instance, category, row)})
        for message in row["messages"]:
            if message["task"] == "caption" and not message["image_turns"]:
                text = message["turns"][-1]["content"]
                captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
        name = names.free(_file_name(row))
        listed.append({"id": number, "file_name": name, "height": row["height"], "width": row["width"]})
        exhaustive = frozenset(row["classes"])
        classes.append((interned.setdefault(exhaustive, exhaustive), frozenset(i["phrase"] for i in row["instances"])))
        if images:
            _write_image(output, name, row["image"])
    for entry, (exhaustive, present) in zip(listed, classes, strict=True):  # now that all categories are known
        entry |= _federated(exhaustive, present, categories)
    base = {"info": {"description": f"from {urls.base_name(shards)}"}, "images": listed}
    _write(output, INSTANCES, base | {"annotations": annotations, "categories": list(categories.values())})
    if captions:
        _write(output, CAPTIONS, base | {"annotations": captions})
    else:  # those of an earlier export have other image ids
        files.remove(urls.join(output, CAPTIONS))
    counts = {"images": len(listed), "annotations": len(annotations), "captions": len(captions)}
    return counts | skipped


def _category(category: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": category["name"]}
    if category.get("keypoints"):
        edges = [[a + 1, b + 1] for a, b in category.get("skeleton") or ()]
        found |= {"keypoints": category["keypoints"], "skeleton": edges}
    if "stuff" in category:
        found["isthing"] = int(not category["stuff"])
    return found


def _federated(
    exhaustive: frozenset[str], present: frozenset[str], categories: dict[str, dict[str, Any]]
) -> dict[str, list[int]]:
    """LVIS's keys of an image, none if all categories are annotated exhaustively."""
    if exhaustive == categories.keys():
        return {}
    absent, incomplete = exhaustive - present, present - exhaustive
    return {
        "neg_category_ids": [c["id"] for n, c in categories.items() if n in absent],
        "not_exhaustive_category_ids": [c["id"] for n, c in categories.items() if n in incomplete],
    }


def _file_name(row: dict[str, Any]) -> str:
    name = row["image_id"]
    if re.search(r"\.\w{2,5}$", name):
        return name
    return name + next((suffix for start, suffix in _SIGNATURES.items() if row["image"].startswith(start)), "")


def _annotation(instance: dict[str, Any], category: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    boxes = Boxes([instance["box"]], (row["height"], row["width"]))
    found: dict[str, Any] = {
        "category_id": category["id"],
        "bbox": boxes.to_xywh()[0].tolist(),
        "area": instance["area"],
        "iscrowd": int(instance["crowd"]),
    }
    if instance["mask"] is not None:
        found["segmentation"] = instance["mask"]
    if category.get("keypoints"):
        points = instance["keypoints"] or [0.0] * (3 * len(category["keypoints"]))
        found |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
    return found


def _write_image(output: urls.Location, name: str, image: bytes) -> None:
    """Writes an encoded image under its file name. Raises `UserError` if the name leads out of the folder."""
    name = name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or urls.is_url(name):
        raise UserError(f"the image id '{name}' cannot be a file name below '{IMAGES}'; export without images",
                        "invalid_image_id")  # fmt: skip
    location = urls.join(output, IMAGES, name)
    files.make_folder(urls.parent(location))
    files.write_bytes(location, image, durable=False)


def _write(output: urls.Location, name: str, data: dict[str, Any]) -> None:
    files.write_bytes(urls.join(urls.absolute(output), name), json.dumps(data).encode())
