"""Boxes: invalid, outside the image, tiny, and repeated ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lumen_ray.data.lint.check import Check, SetFacts
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow
from lumen_ray.structures import Boxes

#: pixels beyond the image's border that rounding explains
_SLACK = 0.5
#: overlap (IoU) from which two boxes of a class look like one object
NEAR_IOU = 0.95
#: share of the image's area from which a box counts as covering it
WHOLE = 0.98
#: smallest number of images to draw conclusions about the whole set from
MIN_IMAGES = 10
_BLOCK = 256  # rows of a table of overlaps that are computed at once


class BoxGeometry(Check):
    """Boxes that are no boxes, leave the image or are too small to see."""

    invalid = Rule(
        "box-invalid", "problem", "objects",
        "boxes have no area or corners that are not finite, so they cannot be trained; correct or delete them",
    )  # fmt: skip
    outside = Rule(
        "box-outside", "problem", "objects",
        "boxes reach beyond their image, often because the image alone was resized; correct or clip them",
    )  # fmt: skip
    tiny = Rule(
        "box-tiny", "warning", "objects",
        "boxes have a side below --min-side pixels (2 by default), often a slip of the mouse; delete or redraw them",
    )  # fmt: skip
    rules = (invalid, outside, tiny)

    def row(self, row: LintRow) -> None:
        for index in np.flatnonzero(~row.valid).tolist():
            self.add(self.invalid, row, row.describe(index), index)
        if row.has_size:
            limit = np.array([row.width, row.height] * 2)
            outside = (row.boxes < -_SLACK) | (row.boxes > limit + _SLACK)
            for index in np.flatnonzero(outside.any(1) & row.valid).tolist():
                where = f"the image of {row.width}x{row.height} pixels"
                self.add(self.outside, row, f"{row.describe(index)} leaves {where}", index)
        tiny = row.valid & ~row.crowd & (row.sides.min(1, initial=np.inf) < self.settings.min_side)
        for index in np.flatnonzero(tiny).tolist():
            width, height = row.sides[index]
            self.add(self.tiny, row, f"'{row.names[index]}' is {width:.3g} pixels wide and {height:.3g} high", index)


class WholeImageBoxes(Check):
    """Boxes that cover their image, if most images with objects have one."""

    whole = Rule(
        "box-whole-image", "note", "images",
        "in most images a box covers the whole image: labels of images, not of objects; draw boxes around the objects",
    )  # fmt: skip
    rules = (whole,)

    def begin(self) -> None:
        self._annotated = 0

    def row(self, row: LintRow) -> None:
        if not row.has_size or not row.valid.any():
            return
        self._annotated += 1
        areas = np.where(row.valid, row.sides.prod(1), 0)
        index = int(areas.argmax())
        if areas[index] >= WHOLE * row.width * row.height:
            self.add(self.whole, row, row.describe(index), index)

    def finish(self, facts: SetFacts) -> None:
        if self._annotated < MIN_IMAGES or self.number(self.whole) <= self._annotated / 2:
            self.drop(self.whole)


class RepeatedObjects(Check):
    """Objects of one class with the same box, or nearly so; crowds aside."""

    repeated = Rule(
        "repeated-object", "problem", "objects",
        "an object is there twice, with one class and box, so counts are wrong and one of the two can never be found; "
        "delete the repetitions",
    )  # fmt: skip
    near = Rule(
        "near-repeat", "warning", "objects",
        f"two boxes of one class overlap by {NEAR_IOU:.0%} (IoU) or more: mostly one object drawn twice; delete one",
    )  # fmt: skip
    rules = (repeated, near)

    def row(self, row: LintRow) -> None:
        by_name: dict[str, list[int]] = {}
        for index in np.flatnonzero(row.valid & ~row.crowd).tolist():
            by_name.setdefault(row.names[index], []).append(index)
        for members in by_name.values():
            self._examine(row, members)

    def _examine(self, row: LintRow, members: list[int]) -> None:
        """Examines the objects of one class."""
        first: dict[tuple[int, ...], int] = {}
        for index, corners in zip(members, (row.boxes[members] * 100).round().astype(int).tolist(), strict=True):
            earlier = first.setdefault(tuple(corners), index)
            if earlier != index:
                self.add(self.repeated, row, f"{row.describe(index)} is there twice", earlier, index)
        seen: set[int] = set()
        for a, b, iou in near_pairs(row, list(first.values())):
            if b not in seen:  # of three boxes that overlap, two are too many, not three
                seen.add(b)
                self.add(self.near, row, f"{row.describe(b)} overlaps another '{row.names[b]}' by {iou:.1%}", a, b)


def near_pairs(row: LintRow, members: list[int]) -> Iterator[tuple[int, int, float]]:
    """(first instance, second one, IoU) of the pairs among `members` that overlap by at least `NEAR_IOU`."""
    size = (row.height or 1, row.width or 1)
    boxes = Boxes(row.boxes[members], size)
    for start in range(0, len(members) - 1, _BLOCK):
        overlaps = boxes[start : start + _BLOCK].iou(boxes[start:])
        for i, j in np.argwhere(np.triu(overlaps, 1) >= NEAR_IOU).tolist():
            yield members[start + i], members[start + j], float(overlaps[i, j])
