"""COCO records (instances, keypoints, captions) to shard rows.

`coco_json.load` parses and merges the json files; `to_row` is a pure function of one image's record and bytes, fit to
run anywhere, and says of every annotation whether it was written or why not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lumen_ray.data import rle as rle_tools
from lumen_ray.data.images import decode
from lumen_ray.data.schema import make_message, make_row
from lumen_ray.data.sources.coco_json import CocoImage, Rejected, is_numbers
from lumen_ray.errors import UserError
from lumen_ray.model.tokenizer import SPECIAL_TOKENS
from lumen_ray.structures import Boxes, Size
from lumen_ray.tasks import get_task


def find_image(folder: str | Path, file_name: str) -> Path | None:
    """The file under `folder`; by its bare name where the json holds another machine's folders; None if absent."""
    candidates = (Path(folder) / file_name, Path(folder) / Path(file_name.replace("\\", "/")).name)
    return next((path for path in candidates if path.is_file()), None)


def _box(annotation: dict[str, Any], mask: rle_tools.Rle | None, size: Size) -> list[float]:
    """xyxy clipped to the image; `UserError` for a box that is malformed, degenerate or outside."""
    bbox = annotation.get("bbox")
    if not bbox and mask is not None:
        bbox = rle_tools.tight_xywh(mask)
    if not is_numbers(bbox) or len(bbox) != 4:
        raise UserError(f"bbox must be four finite numbers [x, y, width, height], got {bbox!r}", "invalid_box")
    if bbox[2] <= 0 or bbox[3] <= 0:
        raise UserError(f"degenerate box {bbox}: width and height must be positive", "invalid_box")
    clipped = Boxes.from_xywh(bbox, size).clip()
    if clipped.area[0] <= 0:
        raise UserError(f"box {bbox} lies outside the image of {size[1]}x{size[0]} pixels", "invalid_box")
    return [float(c) for c in clipped.xyxy[0]]


def _keypoints(annotation: dict[str, Any], number: int, size: Size) -> list[float] | None:
    """Flat x, y, v; None when none is labelled. A labelled point outside the image becomes unlabelled."""
    flat = annotation.get("keypoints")
    if not flat:
        return None
    if not is_numbers(flat) or len(flat) != 3 * number:
        raise UserError(f"expected 3 finite numbers for each of {number} keypoints", "invalid_keypoints")
    if any(v not in (0, 1, 2) for v in flat[2::3]):
        raise UserError("the visibility of a keypoint must be 0, 1 or 2", "invalid_keypoints")
    height, width = size
    points = []
    for x, y, v in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        inside = v > 0 and 0 <= x <= width and 0 <= y <= height
        points += [float(x), float(y), float(v)] if inside else [0.0, 0.0, 0.0]
    return points if any(points[2::3]) else None


def _reserved(text: str) -> str | None:
    """The first token of the prompt layout written in a text: there it would be read as layout, not as words."""
    return next((token for token in SPECIAL_TOKENS if token in text), None)


def _instance(annotation: dict[str, Any], keypoints: dict[str, int], size: Size) -> dict[str, Any]:
    """A schema instance; `UserError` for an annotation that cannot be used."""
    if token := _reserved(annotation["name"]):
        raise UserError(
            f"its category '{annotation['name']}' contains the reserved token {token}; rename it", "reserved_token"
        )
    mask = rle_tools.from_segmentation(annotation.get("segmentation"), size)
    if mask is not None and rle_tools.area(mask) == 0:
        raise UserError("its mask covers no pixel", "invalid_mask")
    box = _box(annotation, mask, size)
    area = annotation.get("area")
    if not isinstance(area, int | float) or not math.isfinite(area) or area <= 0:
        area = rle_tools.area(mask) if mask is not None else (box[2] - box[0]) * (box[3] - box[1])
    return {
        "phrase": annotation["name"],
        "box": box,
        "mask": mask,
        "keypoints": _keypoints(annotation, keypoints.get(annotation["name"], 0), size),
        "crowd": bool(annotation.get("iscrowd")),
        "area": float(area),
    }


def _tasks(classes: list[str], instances: list[dict[str, Any]], captions: int) -> list[str]:
    """What a row can train; masks count only where every object has one."""
    objects = [i for i in instances if not i["crowd"]]
    tasks = ["detect", "count"] if classes else []
    if objects and all(i["mask"] is not None for i in objects):
        tasks.append("segment")
    if any(i["keypoints"] is not None for i in objects):
        tasks.append("pose")
    return tasks + (["caption"] if captions else [])


def _check_size(record: CocoImage, size: Size) -> None:
    for declared in record.sizes:
        if any(declared) and declared != list(size):
            raise UserError(
                f"size mismatch: the annotations say {declared[1]}x{declared[0]} pixels, "
                f"the image has {size[1]}x{size[0]} after EXIF rotation",
                "size_mismatch",
            )


def to_row(
    record: CocoImage, image: bytes | None, keypoints: dict[str, int], source: str
) -> tuple[dict[str, Any] | None, list[Rejected]]:
    """One image's row and its rejected records; no row, and all its annotations rejected, when the image is unusable.

    `image`: the encoded bytes, None if the file is missing; `keypoints`: number of keypoints per category. A class of
    which an annotation was rejected leaves the row's `classes`: it is no longer annotated exhaustively there.
    """
    name = record.file_name
    try:
        if image is None:
            raise UserError("the image file is missing or cannot be opened", "missing_image")
        size = decode(image).shape[:2]  # all of it: a truncated file shows only then
        _check_size(record, size)
    except UserError as error:
        lost = [a["origin"] for a in record.annotations] + [origin for _, origin in record.captions]
        reasons = [
            {"image_id": name, "origin": origin, "reason": f"its image was rejected: {error}"} for origin in lost
        ]
        return None, [{"image_id": name, "origin": record.origin, "reason": str(error)}, *reasons]
    rejected: list[Rejected] = []
    instances, incomplete, messages = [], set(), []
    for annotation in record.annotations:
        try:
            instances.append(_instance(annotation, keypoints, size))
        except UserError as error:
            incomplete.add(annotation["name"])
            rejected.append({"image_id": name, "origin": annotation["origin"], "reason": str(error)})
    for number, (caption, origin) in enumerate(record.captions):
        text = " ".join(caption.split())
        if token := _reserved(text):
            reason = f"the caption contains the reserved token {token}"
            rejected.append({"image_id": name, "origin": origin, "reason": reason})
        elif text:
            messages.append(make_message("caption", get_task("caption").prompt(template=number), text))
        else:
            rejected.append({"image_id": name, "origin": origin, "reason": "the caption is empty"})
    classes = [c for c in record.classes if c not in incomplete and not _reserved(c)]
    row = make_row(name, image, size, source, tasks=_tasks(classes, instances, len(messages)), classes=classes,
                   instances=instances, messages=messages)  # fmt: skip
    return row, rejected
