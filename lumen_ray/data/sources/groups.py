"""Records grouped by image, for sources whose records each name an image.

One image becomes one row, however many expressions, questions or conversations refer to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lumen_ray.data import rle as rle_tools
from lumen_ray.data.frames import AnnotationFrame, read_frame
from lumen_ray.data.sources.base import Outcome, Rejected, image_locations, instance, read_first, reject
from lumen_ray.data.sources.record_parsing import Record, to_box, to_mask
from lumen_ray.errors import UserError


def to_instance(name: str, bbox: Any, segmentation: Any, box_format: str, frame: AnnotationFrame) -> dict[str, Any]:
    """A schema instance in the EXIF-rotated frame; without a box, that of the mask.

    `bbox`: of format `box_format`, see `record_parsing.BOX_FORMATS`; `segmentation`: COCO's. Raises `UserError` if
    either cannot be used.
    """
    mask = to_mask(segmentation, frame.size)
    if bbox is None and mask is not None:
        bbox, box_format = rle_tools.tight_xywh(mask), "xywh"
    return frame.rotated(instance(name, to_box(bbox, box_format, frame.size), mask=mask))


class Images:
    """Records of several files, grouped by image: one json value per image, for a listing.

    `item_kind`: name of a record in the counts. Each record without image is a group of its own.
    """

    def __init__(self, item_kind: str):
        self.item_kind = item_kind
        self.listed = 0
        self.rejected: list[Rejected] = []
        self._groups: dict[Any, dict[str, Any]] = {}

    def add(self, image: str | None, origin: str, item: Record, **details: Any) -> None:
        """Adds `item` with its origin to the group of its image; a group keeps the `details` of its first record."""
        self.listed += 1
        key = image if image is not None else (self.listed,)
        group = self._groups.setdefault(key, {"image": image, "origin": origin, "items": [], **details})
        group["items"].append(item | {"origin": origin})

    def reject(self, image: Any, origin: str, error: UserError) -> None:
        """Rejects a record that cannot be used, whatever its image contains."""
        self.listed += 1
        self.rejected.append(reject(self.item_kind, "" if image is None else str(image), origin, error))

    def __len__(self) -> int:
        return len(self._groups)

    def listing(self) -> list[dict[str, Any]]:
        """The groups, those of images in order of their names."""
        return sorted(self._groups.values(), key=lambda group: (group["image"] is None, group["image"] or ""))


def open_group(folder: str, group: dict[str, Any]) -> tuple[bytes, AnnotationFrame]:
    """The encoded image of a group of `Images`, below `folder`, and its frame, inferred from the group's declared
    `size`.

    Raises `UserError` if the image is missing, broken or of another size, `StoreError` if the store is unreachable.
    """
    data = read_first(*image_locations(folder, group["image"]))
    frame = read_frame(data, [group["size"]] if group.get("size") else [])
    assert data is not None, "read_frame raises"
    return data, frame


def lost_group(row_kind: str, item_kind: str, group: dict[str, Any], error: UserError) -> Outcome:
    """The outcome of an image that cannot be used: it is rejected with all its items."""
    name = str(group["image"] or "")
    items = [reject(item_kind, name, item["origin"], f"its image was rejected: {error}") for item in group["items"]]
    return Outcome(rejected=[reject(row_kind, name, group["origin"], error), *items])


def finished_group(
    row_kind: str, item_kind: str, row: dict[str, Any], group: dict[str, Any], rejected: list[Rejected]
) -> Iterator[Outcome]:
    """The outcome of a group whose items were `rejected` in part; if all were, the row is rejected too."""
    total = len(group["items"])
    if len(rejected) < total:
        yield Outcome(row, {item_kind: total - len(rejected)}, rejected)
        return
    reason = f"none of its {total} {item_kind} can be used"
    yield Outcome(rejected=[reject(row_kind, row["image_id"], group["origin"], reason), *rejected])
