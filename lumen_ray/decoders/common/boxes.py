"""Box geometry on tensors: formats, IoU, GIoU, NMS."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of x in 0..1, with x and 1 - x clamped to at least `eps`."""
    return torch.log(x.clamp_min(eps) / (1 - x).clamp_min(eps))


def to_xyxy(boxes: Tensor) -> Tensor:
    """cxcywh [..., 4] -> xyxy."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """xyxy [..., 4] -> cxcywh."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area [...] of xyxy boxes [..., 4]; 0 for inverted ones."""
    return _area(boxes[..., :2], boxes[..., 2:])


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp_min(0).prod(-1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of xyxy boxes a [..., N, 4] with b [..., M, 4] -> [..., N, M]."""
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    overlap = _area(top_left, bottom_right)
    return overlap / (box_area(a)[..., :, None] + box_area(b)[..., None, :] - overlap).clamp_min(1e-6)


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of xyxy boxes [N, 4], pair by pair (arXiv 1902.09630, alg. 2)."""
    hull = _area(torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:]))
    overlap = _area(torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:]))
    union = box_area(a) + box_area(b) - overlap
    iou = overlap / union.clamp_min(1e-6)
    return 1 - (iou - (hull - union) / hull.clamp_min(1e-6))


def greedy_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the xyxy boxes [N, 4] that greedy non-maximum suppression keeps, best of `scores` [N] first."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = pairwise_iou(boxes[order], boxes[order]).cpu().numpy() > iou_threshold
    dropped = np.zeros(len(order), bool)
    for i in range(len(order)):
        if not dropped[i]:
            dropped[i + 1 :] |= overlaps[i, i + 1 :]
    return order[torch.from_numpy(~dropped).to(order.device)]
