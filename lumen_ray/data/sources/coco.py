"""COCO json (instances, keypoints of any skeleton, captions, LVIS) to shard rows.

`coco_json.load` parses and merges the json files; `to_row` is a pure function of one image's record and bytes, which
writes every annotation or rejects it with a reason.

Frame: inferred from the width and height in the json. If they are those of the EXIF-rotated image (shown by browsers
and OpenCV), coordinates are kept; if they are those of the stored pixels (tools on bare Pillow), boxes, masks and
keypoints are rotated with the image. Rotations that keep the size leave no trace in the json: annotations are then
taken to be in the rotated frame, as without sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.frames import read_frame
from lumen_ray.data.pictures import read_picture
from lumen_ray.data.shards.schema import make_message
from lumen_ray.data.sources import coco_json
from lumen_ray.data.sources.base import Listing, Outcome, Rejected, Source, lost_image, reject
from lumen_ray.data.sources.coco_json import CocoImage
from lumen_ray.data.sources.objects import ObjectList
from lumen_ray.data.sources.record_parsing import caption_texts
from lumen_ray.errors import UserError
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
        lost_images = sum(record["kind"] == "images" for record in loaded.rejected)
        return Listing(
            [vars(image) for image in loaded.images],
            {"images": len(loaded.images) + lost_images, "annotations": loaded.listed - loaded.merged},
            loaded.categories,
            shared,
            loaded.rejected,
            origin={"merged_annotations": loaded.merged},
            notes=loaded.notes,
        )

    def rows(self, record: dict[str, Any], shared: dict[str, Any]) -> Iterator[Outcome]:
        image = CocoImage(**record)
        names = [name for name in (image.file_name, image.path) if name]
        try:
            data = read_picture(self.images, names, image.trust)
        except UserError as error:
            yield _lost(image, error)
        else:
            yield to_row(image, data, shared["keypoints"], image.classes(shared["classes"]), self.kind)


def _lost(record: CocoImage, error: UserError) -> Outcome:
    origins = [a["origin"] for a in record.annotations] + [origin for _, origin in record.captions]
    return lost_image(record.image_id, record.origin, error, origins=origins)


def to_row(record: CocoImage, image: bytes, keypoints: dict[str, int], classes: list[str], source: str) -> Outcome:
    """One image's row and rejected records; without a row and with all annotations rejected if the image is unusable.

    `image`: the encoded bytes; `keypoints`: number of keypoints per category; `classes`: those annotated exhaustively.
    """
    try:
        frame = read_frame(image, record.sizes)
    except UserError as error:
        return _lost(record, error)
    objects = ObjectList(record.image_id, frame, classes)
    for found in record.annotations:
        objects.add(
            found["name"],
            found["origin"],
            bbox=found.get("bbox") or None,
            segmentation=found.get("segmentation"),
            keypoints=found.get("keypoints"),
            num_keypoints=keypoints.get(found["name"], 0),
            crowd=found.get("iscrowd"),
            area=found.get("area"),
            rotation=found.get("rotation"),
        )
    messages, rejected, written = _messages(record)
    outcome = objects.outcome(image, source, messages, ["caption"] if messages else [])
    outcome.rejected += rejected
    outcome.written["annotations"] += written
    return outcome


def _messages(record: CocoImage) -> tuple[list[dict[str, Any]], list[Rejected], int]:
    """(messages of the captions, rejected captions, number of annotations written)."""
    messages: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    for caption, origin in record.captions:
        try:
            texts = caption_texts(caption)
        except UserError as error:
            rejected.append(reject("annotations", record.image_id, origin, error))
            continue
        for text in texts:
            messages.append(make_message("caption", get_task("caption").prompt(template=len(messages)), text))
    return messages, rejected, len(record.captions) - len(rejected)
