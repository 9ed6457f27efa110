"""Upsamples maps of the model input to the stored image."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lumen_ray.structures import Masks
from lumen_ray.targets import Frame

Window = tuple[int, int, int, int]  # x, y, x, y in pixels: left and top inclusive, right and bottom exclusive


def at_stored_size(values: Tensor, stride: int, frame: Frame, window: Window | None = None) -> Tensor:
    """values [h, w] at `stride` from the input's top left corner -> [height, width] of the stored image, bilinear, or
    of a `window` of it."""
    x1, y1, x2, y2 = window or (0, 0, frame.size[1], frame.size[0])
    top, bottom, down = _neighbours(y1, y2, 0, values, stride, frame)
    left, right, across = _neighbours(x1, x2, 1, values, stride, frame)
    rows = torch.lerp(values[top], values[bottom], down[:, None])
    return torch.lerp(rows[:, left], rows[:, right], across)


def _neighbours(
    start: int, end: int, axis: int, values: Tensor, stride: int, frame: Frame
) -> tuple[Tensor, Tensor, Tensor]:
    """The cells before and behind each of the pixels `start`..`end` of an axis, int64, and the weight of the latter."""
    cells = values.shape[axis]
    # at least the image's size: rounding of the input may leave a map short by less than a cell
    length = max(round(cells * stride / frame.scale), frame.size[axis])
    place = (torch.arange(start, end, device=values.device, dtype=values.dtype) + 0.5) * (cells / length) - 0.5
    place = place.clamp(0, cells - 1)
    before = place.floor().long()
    return before, (before + 1).clamp(max=cells - 1), place - before


def masks_at_stored_size(probabilities: Iterable[Tensor], stride: int, frame: Frame) -> Masks:
    """Where maps [h, w] in 0..1 exceed a half, at the size of the stored image.

    Upsamples probabilities, not logits: one very negative cell would move the border inwards. Only the part of the
    image around the cells that exceed a half is computed: hundreds of masks of a large photograph cost little.
    """
    crops, corners = [], []
    for one in probabilities:
        window = _window(one, stride, frame)
        crops.append((at_stored_size(one, stride, frame, window) > 0.5).cpu().numpy())
        corners.append(window[:2])
    return Masks.from_crops(crops, corners, frame.size)


def _window(values: Tensor, stride: int, frame: Frame) -> Window:
    """The part of the stored image beyond which `values` is at most a half once upsampled."""
    above = values > 0.5
    cells = [np.flatnonzero(above.any(axis).cpu().numpy()) for axis in (0, 1)]  # x, y
    ends = []
    for axis, found in zip((1, 0), cells, strict=True):
        if len(found) == 0:
            return 0, 0, 1, 1
        length = max(round(values.shape[axis] * stride / frame.scale), frame.size[axis])
        pixels = length / values.shape[axis]  # of a cell
        start = max(0, math.floor((found[0] - 0.5) * pixels) - 1)
        end = min(frame.size[axis], math.ceil((found[-1] + 1.5) * pixels) + 1)
        ends.append((min(start, frame.size[axis] - 1), max(end, min(start, frame.size[axis] - 1) + 1)))
    (x1, x2), (y1, y2) = ends
    return x1, y1, x2, y2
