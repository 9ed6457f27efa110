"""A row of shards with what several checks need of it, computed once."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np

from lumen_ray.data import rle as rle_tools
from lumen_ray.data.lint.findings import Row
from lumen_ray.errors import UserError


def fingerprint(data: bytes) -> int:
    """The first 8 bytes of the SHA-256 as a number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


class LintRow:
    """A row of `schema.make_row`. Arrays have one entry per instance, in the row's order."""

    def __init__(self, row: Row):
        self.row = row
        self.image_id: str = row["image_id"]
        self.height, self.width = int(row["height"] or 0), int(row["width"] or 0)

    @property
    def instances(self) -> list[dict[str, Any]]:
        return self.row["instances"]

    @property
    def has_size(self) -> bool:
        """False for rows without an image."""
        return self.height > 0 and self.width > 0

    @cached_property
    def names(self) -> list[str]:
        """The class of each instance."""
        return [instance["phrase"] for instance in self.instances]

    @cached_property
    def boxes(self) -> np.ndarray:
        """float64 [N, 4] xyxy, pixels."""
        return np.array([instance["box"] for instance in self.instances], np.float64).reshape(-1, 4)

    @cached_property
    def sides(self) -> np.ndarray:
        """float64 [N, 2]: width and height of each box; not positive for degenerate boxes, NaN for those not finite."""
        with np.errstate(invalid="ignore"):
            return self.boxes[:, 2:] - self.boxes[:, :2]

    @cached_property
    def valid(self) -> np.ndarray:
        """bool [N]: boxes that are finite and have an area."""
        return np.isfinite(self.boxes).all(1) & (self.sides > 0).all(1)

    @cached_property
    def crowd(self) -> np.ndarray:
        """bool [N]."""
        return np.array([bool(instance["crowd"]) for instance in self.instances], bool)

    @cached_property
    def masks(self) -> dict[int, rle_tools.Rle | UserError]:
        """The checked mask of each instance that has one, by index; the error for one that does not fit the image."""
        found: dict[int, rle_tools.Rle | UserError] = {}
        for index, instance in enumerate(self.instances):
            if instance["mask"] is not None:
                try:
                    found[index] = rle_tools.check_rle(instance["mask"], (self.height, self.width))
                except UserError as error:
                    found[index] = error
        return found

    @cached_property
    def image_digests(self) -> list[bytes]:
        """16 bytes of the SHA-256 of each encoded image; empty without one."""
        images = [self.row["image"], *(image["image"] for image in self.row["further_images"])]
        return [hashlib.sha256(image).digest()[:16] for image in images if image]

    @property
    def image_digest(self) -> bytes | None:
        """A digest that is equal for rows of the same image, or of the same images in order; None without one."""
        digests = self.image_digests
        if len(digests) < 2:
            return next(iter(digests), None)
        return hashlib.sha256(b"".join(digests)).digest()[:16]

    def describe(self, index: int) -> str:
        """An instance in words, e.g. ``"'cell' at [10, 20, 30.5, 40]"``."""
        corners = ", ".join(f"{c:.2f}".rstrip("0").rstrip(".") for c in self.boxes[index])
        return f"'{self.names[index]}' at [{corners}]"
