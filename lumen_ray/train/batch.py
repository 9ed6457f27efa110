"""A collator's batch as the model takes it. Torch alone, so that a bare GPU machine can use it."""

from __future__ import annotations

from typing import Any

import torch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device; what is not a tensor stays as it is."""
    moved = dict(batch)
    for name in ("images", "extents", "has_image", "layout", "region_masks", "region_images"):
        moved[name] = batch[name].to(device)
    for name in ("targets", "pixels"):
        own = {id(value): value.to(device) for value in batch[name].values()}  # decoders of one size share theirs
        moved[name] = {key: own[id(value)] for key, value in batch[name].items()}
    return moved
