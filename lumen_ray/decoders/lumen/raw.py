"""The output of the light decoder's forward pass, of which losses and predictions are made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lumen_ray.decoders.lumen.aligner import AlignedPlaces
from lumen_ray.superlink import SuperLink


@dataclass
class LumenRaw:
    """Output of the forward pass. `objects` int64 [P]: the links that are object prompts; `absent` int64: those whose
    object is not in the image, which have no places; the others are keypoint prompts of a parent. `boxes`: made with
    gradients only; `LumenDecoder.boxes_at` makes those of some places."""

    link: SuperLink
    objects: Tensor
    absent: Tensor
    presence: Tensor | None  # [P] logits
    logits: Tensor  # [P, L] heatmap
    boxes: Tensor | None  # [P, L, 4] xyxy
    places: AlignedPlaces
    centers: Tensor  # [L, 2] xy
    shape: tuple[int, int]  # (h, w)
    mask_features: Tensor  # [B, mask_channels, H/4, W/4]
    dense: Tensor  # [B, D, H/4, W/4]
