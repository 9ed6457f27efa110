"""Assigns objects to places of the map in training.

Task-aligned assignment (TOOD, arXiv 2108.07755, sec. 3.2): the `topk` places inside an object with the highest
score^alpha * IoU^beta are positives, several per object. A soft centre prior guides the first steps, when scores and
boxes are still random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lumen_ray.decoders.common.boxes import pairwise_iou


@dataclass
class Assignment:
    """`target` int64 [P, L]: index of the object, -1 for background. `quality` float32 [P, L]: target score of each
    place, 0 for background. `ignored` bool [P, L]: background inside crowd regions, without loss. `inside` bool [P, L]:
    places inside any object, positive or not."""

    target: Tensor
    quality: Tensor
    ignored: Tensor
    inside: Tensor


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    centers: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor,
    topk: int,
    stride: int,
    alpha: float = 0.5,
    beta: float = 4.0,
) -> Assignment:
    """scores [P, L] in 0..1; boxes [P, L, 4]; centers [L, 2] xy; gt_boxes [P, G, 4]; gt_valid, gt_crowd bool [P, G].

    Boxes are xyxy in input pixels. An object that contains no place's centre is assigned the nearest place.
    """
    P, L = scores.shape
    if gt_boxes.shape[1] == 0:
        none = torch.zeros_like(scores)
        return Assignment(torch.full_like(scores, -1, dtype=torch.int64), none, none.bool(), none.bool())
    x, y = centers[:, 0], centers[:, 1]
    x1, y1, x2, y2 = gt_boxes.unbind(-1)  # P G
    inside = (x > x1[..., None]) & (x < x2[..., None]) & (y > y1[..., None]) & (y < y2[..., None])  # P G L
    ignored = (inside & (gt_valid & gt_crowd)[..., None]).any(1)
    objects = (gt_valid & ~gt_crowd)[..., None]
    middle = torch.stack([x1 + x2, y1 + y2], -1) / 2
    extent = torch.stack([x2 - x1, y2 - y1], -1).clamp_min(stride)
    distance = ((centers - middle[:, :, None]) / extent[:, :, None]).square().sum(-1)  # P G L, in box sizes squared
    nearest = torch.zeros_like(inside).scatter_(2, distance.argmin(2, keepdim=True), True)
    inside = (inside | nearest) & objects
    iou = pairwise_iou(gt_boxes, boxes)  # P G L
    prior = torch.exp(-8.0 * distance)
    metric = (scores[:, None].clamp_min(1e-4) ** alpha * (iou + 0.05) ** beta * prior) * inside
    best = metric.topk(min(topk, L), dim=2)
    chosen = torch.zeros_like(metric).scatter_(2, best.indices, best.values) > 0
    metric = metric * chosen
    peak, target = metric.max(1)  # P L: the best object of a place that several claim
    target = torch.where(peak > 0, target, torch.full_like(target, -1))
    # TOOD's normalisation: the target score of an object's best place is its IoU, others are proportional
    top_metric = metric.amax(2).clamp_min(1e-9)  # P G
    top_iou = (iou * chosen).amax(2).clamp_min(0.1)
    index = target.clamp_min(0)
    quality = peak / top_metric.gather(1, index) * top_iou.gather(1, index)
    quality = torch.where(target >= 0, quality.clamp(0, 1), torch.zeros_like(quality))
    return Assignment(target, quality, ignored & (target < 0), inside.any(1))
