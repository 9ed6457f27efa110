"""COCO json (instances, keypoints of any skeleton, captions, LVIS) to shard rows.

`coco_json.load` parses and merges the json files; `to_row` is a pure function of one image's record and bytes, which
writes every annotation or rejects it with a reason.

Frame: inferred from the width and height in the json. If they are those of the EXIF-rotated image (shown by browsers
and OpenCV), coordinates are kept; if they are those of the stored pixels (tools on bare Pillow), boxes, masks and
keypoints are rotated with the image. Rotations that keep the size leave no trace in the json: annotations are then
taken to be in the rotated frame, as without sizes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data import rle as rle_tools
from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources import coco_json
from lumen_ray.data.sources.base import (
    Listing,
    Outcome,
    Source,
    image_locations,
    instance,
    lost_image,
    perception_tasks,
    read_first,
    reject,
)
from lumen_ray.data.sources.coco_json import CocoImage
from lumen_ray.data.sources.record_parsing import is_numbers, reserved_token, to_box, to_mask
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Size
from lumen_ray.tasks import get_task


@dataclass
class CocoSource(Source):
    """`annotations`: COCO json files over the same images; `images`: folder of the images."""

    annotations: list[str]
    images: str
    kind = "coco"

    def __post_init__(self) -> None:
        self.images = urls.absolute(self.images)

    def read_listing(self) -> Listing:
        if not files.is_dir(self.images):
            raise UserError(f"image folder '{urls.shown(self.images)}' does not exist", "missing_images")
        loaded = coco_json.load(self.annotations)
        if not loaded.images:
            raise UserError(f"no images are listed in {', '.join(map(urls.shown, self.annotations))}", "empty_input")
        shared = {
            "keypoints": {c["name"]: len(c["keypoints"]) for c in loaded.categories},
            "classes": loaded.classes,
        }
        return Listing(
            [vars(image) for image in loaded.images],
            {"images": len(loaded.images), "annotations": loaded.listed - loaded.merged},
            loaded.categories,
            shared,
            loaded.rejected,
            origin={"merged_annotations": loaded.merged},
        )

    def rows(self, record: dict[str, Any], shared: dict[str, Any]) -> Iterator[Outcome]:
        image = CocoImage(**record)
        names = [name for name in (image.file_name, image.path) if name]
        data = read_first(*(place for name in names for place in image_locations(self.images, name)))
        yield to_row(image, data, shared["keypoints"], image.classes(shared["classes"]), self.kind)


def _keypoints(annotation: dict[str, Any], number: int, size: Size) -> list[float] | None:
    """Flat x, y, v in pixels; None if none is labelled. A labelled point outside the image becomes unlabelled."""
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
        labelled = v > 0 and 0 <= x <= width and 0 <= y <= height
        points += [float(x), float(y), float(v)] if labelled else [0.0, 0.0, 0.0]
    return points if any(points[2::3]) else None


def _changes(annotation: dict[str, Any], made: dict[str, Any], size: Size) -> Counter[str]:
    """Parts of an annotation that lay outside the image of `size` and are missing from the instance `made` of it."""
    found: Counter[str] = Counter()
    if bbox := annotation.get("bbox"):
        box = Boxes.from_xywh(bbox, size)
        found["boxes clipped"] = int((box.xyxy != box.clip().xyxy).any())
    labelled, kept = (
        sum(v > 0 for v in (flat or ())[2::3]) for flat in (annotation.get("keypoints"), made["keypoints"])
    )
    found["keypoints outside the image"] = labelled - kept
    return +found


def _instance(annotation: dict[str, Any], keypoints: dict[str, int], frame: AnnotationFrame) -> dict[str, Any]:
    """A schema instance in the EXIF-rotated frame. Raises `UserError` if the annotation cannot be used."""
    size, name = frame.size, annotation["name"]
    mask = to_mask(annotation.get("segmentation"), size)
    bbox = annotation.get("bbox")
    if not bbox and mask is not None:
        bbox = rle_tools.tight_xywh(mask)
    area = annotation.get("area")
    if area is None or not is_numbers([area]) or not 0 < area < math.inf:
        area = None
    points = _keypoints(annotation, keypoints.get(name, 0), size)
    crowd = bool(annotation.get("iscrowd"))
    box = to_box(bbox, "xywh", size)
    return frame.rotated(instance(name, box, mask=mask, keypoints=points, crowd=crowd, area=area))


def _messages(record: CocoImage, outcome: Outcome) -> list[dict[str, Any]]:
    messages = []
    for number, (caption, origin) in enumerate(record.captions):
        text = " ".join(caption.split())
        if token := reserved_token(text):
            reason = f"the caption contains the reserved token {token}"
            outcome.rejected.append(reject("annotations", record.file_name, origin, reason))
        elif text:
            messages.append(make_message("caption", get_task("caption").prompt(template=number), text))
        else:
            outcome.rejected.append(reject("annotations", record.file_name, origin, "the caption is empty"))
    return messages


def to_row(
    record: CocoImage, image: bytes | None, keypoints: dict[str, int], classes: list[str], source: str
) -> Outcome:
    """One image's row and rejected records; without a row and with all annotations rejected if the image is unusable.

    `image`: the encoded bytes, None if the file is missing; `keypoints`: number of keypoints per category; `classes`:
    those annotated exhaustively. A class with a rejected annotation is left out of the row's `classes`.
    """
    name = record.file_name
    try:
        frame = read_frame(image, record.sizes)
    except UserError as error:
        lost = [a["origin"] for a in record.annotations] + [origin for _, origin in record.captions]
        return lost_image(name, record.origin, error, origins=lost)
    outcome, instances, incomplete = Outcome(), [], set()
    changed: Counter[str] = Counter()
    for annotation in record.annotations:
        try:
            made = _instance(annotation, keypoints, frame)
        except UserError as error:
            incomplete.add(annotation["name"])
            outcome.rejected.append(reject("annotations", name, annotation["origin"], error))
        else:
            instances.append(made)
            changed += _changes(annotation, made, frame.size)
    messages = _messages(record, outcome)
    classes = [c for c in classes if c not in incomplete and not reserved_token(c)]
    tasks = perception_tasks(classes, instances) + (["caption"] if messages else [])
    outcome.row = make_row(name, image, frame.rotated_size, source, tasks=tasks, classes=classes, instances=instances,
                           messages=messages)  # fmt: skip
    outcome.written = {"annotations": len(instances) + len(messages)}
    outcome.changed = dict(changed)
    return outcome
