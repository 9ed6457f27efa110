"""Input size rules of decoders that read images directly: from an image's shape to a size in pixels.

The trunk reads all images in a few small input sizes. A decoder with a size rule gets each image resampled from the
stored one to the size the rule gives, both in training and at inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lumen_ray.errors import UserError
from lumen_ray.structures import Size

Shape = tuple[float, float]  # (height, width)
Scale = tuple[float, float]  # of x and of y
_ROUNDING = 1e-3  # pixels; floating-point error that must not round a side up


@dataclass(frozen=True)
class ShortSide:
    """DETR's rule (arXiv 2005.12872, sec. 4), also Grounding DINO's: resizes the shorter side to `short` pixels, or
    less where the longer side would exceed `long`."""

    short: int
    long: int

    def __str__(self) -> str:
        return f"shorter side {self.short} pixels, longer side at most {self.long}"

    @property
    def longest(self) -> int:
        """The longest side in pixels of any input."""
        return self.long

    def fit(self, shape: Shape, room: float = 1.0) -> tuple[Size, Scale]:
        """(height, width) in pixels for an image of this shape, and the scale of its coordinates.

        `room`: divides the scale; an image zoomed out by this factor stays that much smaller."""
        scale = min(self.short / min(shape), self.long / max(shape)) / room
        height, width = (max(1, math.ceil(side * scale - _ROUNDING)) for side in shape)
        return (height, width), (scale, scale)


@dataclass(frozen=True)
class PictureSize:
    """The rule of images to generate or edit: about `side` x `side` pixels in the aspect ratio of the source, with
    sides that are multiples of `step` and at most `most`. `asked`: a fixed (height, width) instead."""

    side: int
    most: int
    step: int
    asked: Size | None = None

    def __str__(self) -> str:
        return f"{self.side} x {self.side} pixels, or about as many in another shape"

    @property
    def longest(self) -> int:
        """The longest side in pixels of any input."""
        return self.most

    def fit(self, shape: Shape, room: float = 1.0) -> tuple[Size, Scale]:
        """(height, width) in pixels for an image of this shape, and the scale of its coordinates.

        The image fills this size, stretched slightly where rounding to `step` changes the aspect ratio. `room` is
        ignored."""
        height, width = self.asked or self._size(shape)
        return (height, width), (width / shape[1], height / shape[0])

    def _size(self, shape: Shape) -> Size:
        scale = min(self.side / math.sqrt(shape[0] * shape[1]), self.most / max(shape))
        height, width = (min(max(1, round(e * scale / self.step)), self.most // self.step) * self.step for e in shape)
        return height, width

    def check(self, size: Size) -> None:
        """Raises `UserError` if images of this (height, width) cannot be generated."""
        if not all(side > 0 and side % self.step == 0 for side in size):
            raise UserError(
                f"the size {size[1]}x{size[0]} cannot be drawn; give a width and a height that are multiples of "
                f"{self.step}",
                "invalid_sampling",
            )
        if max(size) > self.most:
            raise UserError(
                f"the size {size[1]}x{size[0]} is too large; give sides of at most {self.most}", "invalid_sampling"
            )


SizeRule = ShortSide | PictureSize


def padded_pixels(sizes: Iterable[Size]) -> int:
    """Pixels per image after images of (height, width) `sizes` are padded to one tensor."""
    return math.prod(max(sides) for sides in zip(*sizes, strict=True))


def by_size(sizes: list[Size]) -> dict[Size, list[int]]:
    """Indices of images by (height, width)."""
    members: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        members.setdefault(size, []).append(index)
    return members
