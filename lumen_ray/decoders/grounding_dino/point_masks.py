"""Mask losses on points (PointRend, arXiv 1912.08193; Mask2Former, arXiv 2112.01527, sec. 3.3).

A loss on every pixel would dominate memory, and most pixels are far from any border. Three quarters of the points are
the most uncertain of three times as many random ones, the rest are random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OVERSAMPLE, UNCERTAIN = 3, 0.75


def at_points(maps: Tensor, points: Tensor, stride: int) -> Tensor:
    """maps [K, h, w] at `stride`, points float32 [K, R, 2] xy in input pixels -> bilinear values float32 [K, R]."""
    size = points.new_tensor([maps.shape[2], maps.shape[1]]) * stride
    grid = points / size * 2 - 1
    return F.grid_sample(maps[:, None].float(), grid[:, None], align_corners=False)[:, 0, 0]


@torch.no_grad()
def choose_points(logits: Tensor, extents: Tensor, count: int, stride: int) -> Tensor:
    """Samples points float32 [K, count, 2] xy in input pixels; `extents` float32 [K, 2]: (width, height) of the image.

    Points lie between the centres of the image's outermost cells, so padding has no influence."""
    last = (extents / stride).ceil() * stride - stride / 2

    def draw(number: int) -> Tensor:
        points = torch.rand(len(logits), number, 2, device=logits.device) * extents[:, None]
        return torch.minimum(points.clamp_min(stride / 2), last[:, None])

    uncertain, drawn = int(count * UNCERTAIN), draw(count * OVERSAMPLE)
    nearest = at_points(logits, drawn, stride).abs().topk(uncertain, dim=1, largest=False).indices
    rest = draw(count - uncertain)
    return torch.cat([drawn.gather(1, nearest[..., None].expand(-1, -1, 2)), rest], dim=1)


def inside(maps: Tensor, extents: Tensor, stride: int) -> Tensor:
    """bool [K, h, w]: the cells of `maps` [K, h, w] that are not padding; `extents` as in `choose_points`."""
    columns, rows = (extents / stride).ceil()[:, :, None].unbind(1)
    down, across = (torch.arange(side, device=maps.device) for side in maps.shape[1:])
    return (down < rows)[:, :, None] & (across < columns)[:, None]


def mask_losses(logits: Tensor, masks: Tensor, extents: Tensor, count: int, stride: int) -> tuple[Tensor, Tensor]:
    """Binary cross entropy and dice loss of each mask, [K] each, on `count` points, or on all cells if there are no
    more of them, which costs less.

    logits [K, h, w] and true `masks` [K, H, W] in 0..1, both at `stride`; `extents` as in `choose_points`."""
    if count < logits.shape[1] * logits.shape[2]:
        points = choose_points(logits, extents, count, stride)
        predicted, truth = at_points(logits, points, stride), at_points(masks, points, stride)
        used = torch.ones_like(predicted)
    else:
        predicted, truth = logits.float().flatten(1), masks.float().flatten(1)
        used = inside(logits, extents, stride).float().flatten(1)
    bce = F.binary_cross_entropy_with_logits(predicted, truth, reduction="none")
    bce = (bce * used).sum(1) / used.sum(1)
    p = predicted.sigmoid() * used
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + (truth * used).sum(1) + 1)
    return bce, dice
