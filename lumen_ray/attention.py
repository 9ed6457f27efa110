"""Attention masks as additive biases on the logits, the form that every attention of the package takes."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_to_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [..., T, S] -> a bias of the same shape: 0 where attention is allowed, the dtype's minimum elsewhere.

    The minimum is finite, so a fully masked row gives uniform weights instead of NaN.
    """
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
