"""Box geometry on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of x in 0..1, with x and 1 - x held to at least `eps`."""
    return torch.log(x.clamp_min(eps) / (1 - x).clamp_min(eps))


def to_xyxy(boxes: Tensor) -> Tensor:
    """cxcywh [..., 4] -> xyxy."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """xyxy [..., 4] -> cxcywh."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of matching xyxy boxes [N, 4] (arXiv 1902.09630)."""
    top_left, bottom_right = torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])
    hull = (bottom_right - top_left).clamp_min(0).prod(-1)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).clamp_min(0).prod(-1) + (b[:, 2:] - b[:, :2]).clamp_min(0).prod(-1) - overlap
    iou = overlap / union.clamp_min(1e-6)
    return 1 - (iou - (hull - union) / hull.clamp_min(1e-6))
