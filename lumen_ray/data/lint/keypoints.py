"""Keypoints: far from their objects, or all unlabelled."""

from __future__ import annotations

import numpy as np

from lumen_ray.data.lint.check import Check
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow

#: distance from the box, in sides of the box, from which a keypoint is far away
FAR = 0.5


class KeypointPlaces(Check):
    """Labelled keypoints against the boxes of their objects."""

    far = Rule(
        "keypoint-far", "warning", "objects",
        "keypoints lie outside the box of their object by more than half its size, mostly those of another object; "
        "match keypoints and boxes again",
    )  # fmt: skip
    unlabelled = Rule(
        "keypoints-unlabelled", "warning", "objects",
        "objects have keypoints of which none is labelled (v is 0), so they train no pose; label or delete them",
    )  # fmt: skip
    rules = (far, unlabelled)

    def row(self, row: LintRow) -> None:
        for index, instance in enumerate(row.instances):
            flat = instance["keypoints"]
            if flat is None or len(flat) == 0 or len(flat) % 3:
                continue
            points = np.array(flat, np.float64).reshape(-1, 3)
            points = points[points[:, 2] > 0, :2]
            if not len(points):
                self.add(self.unlabelled, row, row.describe(index), index)
            elif row.valid[index]:
                self._measure(row, index, points)

    def _measure(self, row: LintRow, index: int, points: np.ndarray) -> None:
        low, high = row.boxes[index, :2], row.boxes[index, 2:]
        distance = (np.maximum(low - points, points - high) / row.sides[index]).max(1)
        if (distance > FAR).any():
            x, y = points[distance.argmax()]
            self.add(self.far, row, f"{row.describe(index)} has a keypoint at ({x:g}, {y:g})", index)
