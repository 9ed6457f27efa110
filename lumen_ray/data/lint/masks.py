"""Masks: of another size than their image, empty, at odds with their boxes; and crowds."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from lumen_ray.data.lint.check import Check, SetFacts
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes

#: a mask disagrees with its box if its tight box overlaps the box by less (IoU; in COCO, where masks lose thin tips of
#: outlines, it is from 0.86), and
MIN_IOU = 0.85
#: an edge is off by more pixels
MAX_OFF = 2.0
#: smallest number of masks to draw conclusions about the whole set from
MIN_MASKS = 10
#: share of masks that must be short of their boxes
MOST = 0.8
#: smallest number of masks, all of them crowds, that cannot be by chance
MIN_CROWDS = 5


class MaskGeometry(Check):
    """Masks against their images and boxes."""

    misfit = Rule(
        "mask-size", "problem", "objects",
        "masks do not fit their image: of another size, or damaged; write them again at the size of the image",
    )  # fmt: skip
    empty = Rule(
        "mask-empty", "problem", "objects",
        "masks have no pixel, so the object is trained as invisible; redraw them, or delete the object",
    )  # fmt: skip
    off = Rule(
        "mask-off-box", "warning", "objects",
        f"masks and boxes show different extents: an edge differs by more than {MAX_OFF:g} pixels, and they overlap by "
        f"less than {MIN_IOU:.0%} (IoU); take the box of the mask, or match masks and boxes again",
    )  # fmt: skip
    short = Rule(
        "masks-short", "warning", "objects",
        "most masks end one pixel before the right and lower edge of their boxes, as outlines exported by supervision "
        "do; export masks as RLE instead",
    )  # fmt: skip
    rules = (misfit, empty, off, short)

    def begin(self) -> None:
        self._compared = 0

    def row(self, row: LintRow) -> None:
        filled = []
        for index, mask in row.masks.items():
            if isinstance(mask, UserError):
                self.add(self.misfit, row, f"{row.describe(index)}: {mask}", index)
            elif coco_mask.area(mask) == 0:
                self.add(self.empty, row, row.describe(index), index)
            elif row.valid[index]:
                filled.append(index)
        if filled:
            self._compare(row, filled)

    def _compare(self, row: LintRow, members: list[int]) -> None:
        """Compares the masks of `members` with their boxes."""
        size = (row.height, row.width)
        tight = Boxes.from_xywh(coco_mask.toBbox([row.masks[i] for i in members]), size)
        boxes = Boxes(row.boxes[members], size)
        beyond = boxes.xyxy.astype(np.float64) - tight.xyxy  # of the box beyond the mask, per edge
        self._compared += len(members)
        short = (np.abs(beyond[:, :2]) <= 0.5).all(1) & (np.abs(beyond[:, 2:] - 1) <= 0.5).all(1)
        apart = np.flatnonzero(np.abs(beyond).max(1) > MAX_OFF)
        for place in np.flatnonzero(short).tolist():
            self.add(self.short, row, row.describe(members[place]), members[place])
        for place in apart.tolist():
            if (iou := float(boxes[place].iou(tight[place])[0, 0])) < MIN_IOU:
                index, corners = members[place], ", ".join(f"{c:g}" for c in tight.xyxy[place])
                self.add(self.off, row, f"{row.describe(index)}, its mask at [{corners}] (IoU {iou:.0%})", index)

    def finish(self, facts: SetFacts) -> None:
        if self._compared < MIN_MASKS or self.number(self.short) < MOST * self._compared:
            self.drop(self.short)


class MixedMasks(Check):
    """Objects without a mask beside objects with one."""

    mixed = Rule(
        "masks-missing", "warning", "images",
        "some objects of an image have a mask and others have none, so the image trains no segmentation; add the masks",
    )  # fmt: skip
    rules = (mixed,)

    def row(self, row: LintRow) -> None:
        objects = np.flatnonzero(~row.crowd).tolist()
        bare = [index for index in objects if row.instances[index]["mask"] is None]
        if bare and len(bare) < len(objects):
            self.add(self.mixed, row, f"{len(bare)} of {len(objects)} objects, e.g. {row.describe(bare[0])}", *bare)


class Crowds(Check):
    """Sets in which every mask is marked as a crowd."""

    crowds = Rule(
        "all-crowd", "problem", "objects",
        "every object with a mask is marked as a crowd, as datumaro exports them, so none is trained or scored; set "
        "iscrowd to 0 (datumaro: is_crowd=False)",
    )  # fmt: skip
    rules = (crowds,)

    def begin(self) -> None:
        self._objects = self._masks = 0

    def row(self, row: LintRow) -> None:
        masked = [index for index, instance in enumerate(row.instances) if instance["mask"] is not None]
        self._objects += len(row.instances)
        self._masks += len(masked)
        crowds = [index for index in masked if row.crowd[index]]
        if crowds:
            self.add(self.crowds, row, f"{len(crowds)} objects", *crowds, number=len(crowds))

    def finish(self, facts: SetFacts) -> None:
        crowds = self.number(self.crowds)
        # real crowds beside plain boxes are a minority of the objects
        if crowds < MIN_CROWDS or crowds < self._masks or crowds <= self._objects / 2:
            self.drop(self.crowds)
