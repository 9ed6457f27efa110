"""The frame of annotations: some tools write them for the stored pixels, others for the EXIF-rotated image. Maps the
former into the rotated frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumen_ray.data.images import decode, orientation
from lumen_ray.errors import UserError
from lumen_ray.structures import Masks, Size

# By EXIF orientation, for stored pixels of height h and width w: the map of (x, y), and of arrays [h, w].
_POINT: dict[int, Callable[[float, float, int, int], tuple[float, float]]] = {
    5: lambda x, y, h, w: (y, x),
    6: lambda x, y, h, w: (h - y, x),
    7: lambda x, y, h, w: (h - y, w - x),
    8: lambda x, y, h, w: (y, w - x),
}
_ARRAY: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True)
class AnnotationFrame:
    """`size`: (height, width) of the frame that annotations are given in; `rotated_size`: of the image after EXIF
    rotation; `turn`: the EXIF orientation that maps the first to the second, 1 if they are the same frame; `assumed`:
    whether the declared sizes fit the stored image as well, so that the rotated frame is a guess."""

    size: Size
    rotated_size: Size
    turn: int = 1
    assumed: bool = False

    def moved(self, points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        """Maps (x, y) pairs, in pixels, into the rotated frame."""
        return [(x, y) if self.turn == 1 else _POINT[self.turn](x, y, *self.size) for x, y in points]

    def rotated(self, instance: dict[str, Any]) -> dict[str, Any]:
        """Maps the box, mask and keypoints of a schema instance into the rotated frame."""
        if self.turn == 1:
            return instance
        x1, y1, x2, y2 = instance["box"]
        corners = np.array(self.moved([(x1, y1), (x2, y2)]))
        moved = {**instance, "box": [*corners.min(0).tolist(), *corners.max(0).tolist()]}
        if instance["mask"] is not None:
            pixels = Masks([instance["mask"]], self.size).to_arrays()[0]
            moved["mask"] = Masks.from_arrays(_ARRAY[self.turn](pixels)[None]).rles[0]
        if instance["keypoints"] is not None:
            points = np.array(instance["keypoints"]).reshape(-1, 3)
            turned = [(*_POINT[self.turn](x, y, *self.size), v) if v else (0.0, 0.0, 0.0) for x, y, v in points]
            moved["keypoints"] = [float(c) for point in turned for c in point]
        return moved


def read_frame(image: bytes | None, declared: Sequence[Sequence[Any]]) -> AnnotationFrame:
    """Infers the frame of an image's annotations from their `declared` (height, width); zeros declare nothing. Without
    any, annotations are by definition in the rotated frame.

    `image`: encoded bytes, which are decoded completely, since truncation shows only then. Raises `UserError` if the
    image is missing (None) or broken, or a declared size is neither the stored nor the rotated one.
    """
    if image is None:
        raise UserError("the image file is missing or cannot be opened", "missing_image")
    height, width = decode(image).shape[:2]
    size, stored = (height, width), (width, height)
    given = [tuple(d) for d in declared if all(d)]
    turn = orientation(image)
    if all(d == size for d in given):
        fits_both = turn in _POINT and all(d == stored for d in given)
        return AnnotationFrame(size, size, assumed=bool(declared) and (fits_both or 1 < turn < 5))
    if turn in _POINT and all(d == stored for d in given):
        return AnnotationFrame(stored, size, turn)
    wrong = next(d for d in given if d != size)
    raise UserError(
        f"size mismatch: the annotations say {wrong[1]}x{wrong[0]} pixels, "
        f"the image has {width}x{height} after EXIF rotation",
        "size_mismatch",
    )
