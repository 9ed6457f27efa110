"""Upsamples maps of the model input to the stored image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lumen_ray.targets import Frame


def at_stored_size(values: Tensor, stride: int, frame: Frame) -> Tensor:
    """values [h, w] at `stride` from the input's top left corner -> [height, width] of the stored image, bilinear."""
    height, width = frame.size
    # at least the image's size: rounding of the input may leave a map short by less than a cell
    shape = [max(round(side * stride / frame.scale), low) for side, low in zip(values.shape, frame.size, strict=True)]
    return F.interpolate(values[None, None], shape, mode="bilinear", align_corners=False)[0, 0, :height, :width]
