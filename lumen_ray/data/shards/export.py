"""Shards back to COCO json.

What came in as COCO comes out with the same classes, masks and crowd flags, the same captions but for runs of blanks,
boxes, areas and labelled keypoints as float32, all in the frame of the EXIF-rotated image. Not the same: images,
annotations and categories are numbered anew, polygons are RLE, what lay outside its image is cut off (boxes clipped,
keypoints unlabelled; the manifest's `changed` counts both), unlabelled keypoints have coordinates of 0, and annotations
that stood twice or were rejected are left out.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.shards.shards import read_manifest, read_rows
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes

#: how files begin, for images whose id is no file name
_SIGNATURES = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
_SIGNATURES |= {b"II*": ".tif", b"MM\0*": ".tif"}
INSTANCES, CAPTIONS, IMAGES = "instances.json", "captions.json", "images"


def export_coco(shards: urls.Location, output: urls.Location, *, images: bool = False) -> dict[str, int]:
    """Write ``instances.json`` (and ``captions.json`` where there are captions) into the folder `output`; counts.

    Boxes are xywh in float64 without rounding, so that reading them again gives the same float32 corners; masks are
    compressed RLE, keypoints in COCO's order with skeletons counted from 1. Images and annotations are numbered from 1;
    `file_name` is the rows' `image_id`, with an extension where it has none. Where a row is not annotated for all
    classes, the image carries LVIS's ``neg_category_ids`` and ``not_exhaustive_category_ids``. `images`: also write the
    encoded images, as they are, to ``images/``. Rows without an image are left out and counted under "without_image".
    What COCO has no place for (questions, regions, phrases) is not written.
    """
    manifest = read_manifest(shards)
    categories = {c["name"]: {"id": n, **_category(c)} for n, c in enumerate(manifest["categories"], start=1)}
    listed: list[dict[str, Any]] = []
    asked: list[tuple[frozenset[str], frozenset[str]]] = []  # per image: the classes annotated for, those shown
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    asked_before: dict[frozenset[str], frozenset[str]] = {}  # one copy of what most rows have in common
    skipped = 0
    files.make_folder(output)
    for row in read_rows(shards):
        if row["image"] is None:
            skipped += 1
            continue
        number = len(listed) + 1
        for instance in row["instances"]:
            name = instance["phrase"]
            category = categories.setdefault(name, {"id": len(categories) + 1, "name": name})
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(instance, category, row)})
        for message in row["messages"]:
            if message["task"] == "caption":
                text = message["turns"][-1]["content"]
                captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
        listed.append({"id": number, "file_name": _file_name(row), "height": row["height"], "width": row["width"]})
        classes = frozenset(row["classes"])
        asked.append((asked_before.setdefault(classes, classes), frozenset(i["phrase"] for i in row["instances"])))
        if images:
            _write_image(output, row)
    for entry, (exhaustive, shown) in zip(listed, asked, strict=True):  # now that all categories are known
        entry |= _federated(exhaustive, shown, categories)
    base = {"info": {"description": f"from {urls.base_name(shards)}"}, "images": listed}
    _write(output, INSTANCES, base | {"annotations": annotations, "categories": list(categories.values())})
    if captions:
        _write(output, CAPTIONS, base | {"annotations": captions})
    counts = {"images": len(listed), "annotations": len(annotations), "captions": len(captions)}
    return counts | {"without_image": skipped}


def _category(category: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": category["name"]}
    if category.get("keypoints"):
        edges = [[a + 1, b + 1] for a, b in category.get("skeleton") or ()]
        found |= {"keypoints": category["keypoints"], "skeleton": edges}
    if "stuff" in category:
        found["isthing"] = int(not category["stuff"])
    return found


def _federated(
    exhaustive: frozenset[str], shown: frozenset[str], categories: dict[str, dict[str, Any]]
) -> dict[str, list[int]]:
    """LVIS's keys of an image, none where all categories are annotated."""
    if exhaustive == categories.keys():
        return {}
    absent, incomplete = exhaustive - shown, shown - exhaustive
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


def _write_image(output: urls.Location, row: dict[str, Any]) -> None:
    """The encoded bytes under the image's own name, which must not lead out of the folder."""
    name = _file_name(row).replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or urls.is_url(name):
        raise UserError(f"the image id '{name}' cannot be a file name below '{IMAGES}'; export without images",
                        "invalid_image_id")  # fmt: skip
    location = urls.join(output, IMAGES, name)
    files.make_folder(urls.parent(location))
    files.write_bytes(location, row["image"], durable=False)


def _write(output: urls.Location, name: str, data: dict[str, Any]) -> None:
    files.write_bytes(urls.join(urls.absolute(output), name), json.dumps(data).encode())
