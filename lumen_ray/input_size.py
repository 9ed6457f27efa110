"""How large a decoder that looks at images itself gets them: rules on an image's shape, in plain numbers.

The trunk sees all images in its few small inputs. A decoder with a rule of its own gets each image in a size of its
own, resampled from the stored one, in training and at inference alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lumen_ray.errors import UserError
from lumen_ray.structures import Size

Shape = tuple[float, float]  # (height, width)
Scale = tuple[float, float]  # of x and of y
_ROUNDING = 1e-3  # of a pixel: what floating point may leave of one


@dataclass(frozen=True)
class ShortSide:
    """The rule of DETR (arXiv 2005.12872, sec. 4) and Grounding DINO: the shorter side gets `short` pixels, unless the
    longer one would get more than `long`."""

    short: int
    long: int

    def __str__(self) -> str:
        return f"{self.short} pixels of the shorter side, of the longer {self.long} at most"

    def fit(self, shape: Shape, room: float = 1.0) -> tuple[Size, Scale]:
        """(height, width) in pixels of an image of this shape, and what its coordinates are multiplied by.

        `room`: how many times larger the rule takes the image for than it is: zoomed out, it stays smaller."""
        scale = min(self.short / min(shape), self.long / max(shape)) / room
        height, width = (max(1, math.ceil(side * scale - _ROUNDING)) for side in shape)
        return (height, width), (scale, scale)


@dataclass(frozen=True)
class PictureSize:
    """The rule of pictures to draw or edit: about `side` squared pixels in the shape of the image, as near as multiples
    of `step` come to it, with sides of at most `most`. `asked`: (height, width) instead, whatever the shape."""

    side: int
    most: int
    step: int
    asked: Size | None = None

    def __str__(self) -> str:
        return f"{self.side} x {self.side} pixels, or about as many in another shape"

    def fit(self, shape: Shape, room: float = 1.0) -> tuple[Size, Scale]:
        """(height, width) in pixels for an image of this shape, and what its coordinates are multiplied by.

        The image fills it, stretched by what rounding to `step` takes; `room` does not matter."""
        height, width = self.asked or self._size(shape)
        return (height, width), (width / shape[1], height / shape[0])

    def _size(self, shape: Shape) -> Size:
        scale = min(self.side / math.sqrt(shape[0] * shape[1]), self.most / max(shape))
        height, width = (min(max(1, round(e * scale / self.step)), self.most // self.step) * self.step for e in shape)
        return height, width

    def check(self, size: Size) -> None:
        """`UserError` for a (height, width) that cannot be drawn."""
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
    """Pixels of each of some images of (height, width) `sizes` once they are padded to lie in one tensor."""
    return math.prod(max(sides) for sides in zip(*sizes, strict=True))


def by_size(sizes: list[Size]) -> dict[Size, list[int]]:
    """Size -> indices of the images that have it."""
    found: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        found.setdefault(size, []).append(index)
    return found
