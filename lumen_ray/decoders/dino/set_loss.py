"""Targets, bipartite matching and losses of a set of boxes (DETR, arXiv 2005.12872, sec. 3.1).

Legend: G groups, T prompts of the largest group, Q queries, N objects of all groups, M objects of the largest group.
Boxes are cxcywh in 0..1 of the image without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lumen_ray.decoders.common.boxes import giou_loss, to_cxcywh, to_xyxy
from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.settings import DinoLossSettings
from lumen_ray.structures import Size
from lumen_ray.targets import PerceptionTargets

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # focal loss, arXiv 1708.02002
NEVER = 1e6  # cost of a pair that is not allowed


class Boxes(Protocol):
    """Predicted boxes, float32 [G, Q, 4]."""

    @property
    def boxes(self) -> Tensor: ...


class Queries(Boxes, Protocol):
    """Predictions of a layer: class logits float32 [G, Q, T], -inf at padded links, and boxes."""

    @property
    def logits(self) -> Tensor: ...


class BoxTargets(Protocol):
    """Objects with `boxes` float32 [N, 4]; `scale` float32 [G, 4] as in `Objects`."""

    boxes: Tensor
    scale: Tensor


@dataclass
class Objects:
    """The ground truth, group by group. An object shared by several prompts of a group is one, with several labels."""

    group: Tensor  # int64 [N], ascending
    boxes: Tensor  # float32 [N, 4]
    labels: Tensor  # float32 [N, T], 1 at its prompts
    mask: Tensor  # int64 [N] into `PerceptionTargets.masks`, or -1
    entry: Tensor  # int64 [N, 2]: (link, column) of its first entry in the targets
    counted: Tensor  # bool [G, T]: prompts that have detection targets
    scale: Tensor  # float32 [G, 4]: width, height, width, height of the groups' images in pixels

    def __len__(self) -> int:
        return len(self.group)

    @property
    def seats(self) -> Seats:
        """Row (group) and column of every object in a table [G, M]."""
        return Seats.of(self.group, len(self.scale))

    @property
    def counts(self) -> Tensor:
        """Objects per group, int64 [G]."""
        return self.group.bincount(minlength=len(self.scale))


def find_objects(targets: PerceptionTargets, links: Tensor, seats: Seats, sizes: list[Size]) -> Objects:
    """Collects the objects of all groups, without crowds. `links` int64 [P']: the object prompts; `seats`: their cells
    in [G, T]; `sizes`: (height, width) of each group's image without padding."""
    wanted = targets.valid & ~targets.crowd & targets.counted[:, None]
    prompt, column = torch.nonzero(wanted[links], as_tuple=True)
    link, row = links[prompt], seats.row[prompt]
    instance = targets.instance[link, column]
    most = int(instance.max()) + 1 if len(instance) else 1
    key, which = (row * most + instance).unique(return_inverse=True)
    order = torch.arange(len(which), device=which.device)
    first = which.new_full((len(key),), len(which)).scatter_reduce(0, which, order, "amin")
    labels = targets.boxes.new_zeros(len(key), seats.shape[1])
    labels[which, seats.seat[prompt]] = 1.0
    mask = which.new_full((len(key),), -1).scatter_reduce(0, which, targets.mask_index[link, column], "amax")
    group = torch.div(key, most, rounding_mode="floor")
    scale = targets.boxes.new_tensor([(width, height, width, height) for height, width in sizes])
    boxes = to_cxcywh(targets.boxes[link[first], column[first]] / scale[group])
    counted = seats.fill(targets.counted[links][:, None])[..., 0]
    return Objects(group, boxes, labels, mask, torch.stack([link[first], column[first]], -1), counted, scale)


class Matches(NamedTuple):
    """K queries and the object assigned to each: int64 [K] each."""

    group: Tensor
    query: Tensor
    object: Tensor


@torch.no_grad()
def match(layers: Sequence[Queries], query_valid: Tensor, objects: Objects, s: DinoLossSettings) -> list[Matches]:
    """Minimum-cost assignment of objects to queries, layer by layer; with too few queries some objects have none. An
    object gets `auxiliary_matches` queries in all layers but the last."""
    device = objects.group.device
    if not len(objects):
        none = torch.empty(0, dtype=torch.int64, device=device)
        return [Matches(none, none, none)] * len(layers)
    allowed = query_valid[..., None]
    copies = [*[s.auxiliary_matches] * (len(layers) - 1), 1]
    return [
        assign(_costs(layer, objects, s), allowed, objects.counts, number)
        for layer, number in zip(layers, copies, strict=True)
    ]


def assign(costs: Tensor, allowed: Tensor, counts: Tensor, copies: int = 1) -> Matches:
    """Minimum-cost assignment in each group (Hungarian algorithm). costs [G, Q, M], of which the first `counts` (int64
    [G]) columns of each group are objects; `allowed` bool [G, Q, M or 1]: pairs that may be matched. Each object is
    assigned to `copies` queries, or to as many as there are for each."""
    device = costs.device
    costs = costs.nan_to_num(NEVER, NEVER, NEVER)  # the training loop reports a loss of NaN, with its samples
    table = costs.masked_fill(~allowed, NEVER).cpu().numpy()
    may_match, triples, start = allowed.expand_as(costs).cpu().numpy(), [], 0
    for group, count in enumerate(counts.tolist()):
        number = max(1, min(copies, table.shape[1] // max(1, count)))
        for query, place in zip(*linear_sum_assignment(np.tile(table[group, :, :count], number)), strict=True):
            column = place % count
            if may_match[group, query, column]:
                triples.append((group, int(query), start + int(column)))
        start += count
    return Matches(*torch.tensor(triples, dtype=torch.int64).view(-1, 3).to(device).unbind(1))


def _costs(layer: Queries, objects: Objects, s: DinoLossSettings) -> Tensor:
    """[G, Q, M]: focal class cost, L1 and GIoU as in Deformable DETR (arXiv 2010.04159)."""
    seats = objects.seats
    labels, truth = seats.fill(objects.labels), seats.fill(objects.boxes)  # G M T, G M 4
    share = labels / labels.sum(-1, keepdim=True).clamp_min(1)
    per_class = class_cost(layer.logits) @ share.transpose(1, 2)
    return s.class_cost * per_class + box_cost(layer.boxes, truth, objects.scale, s)


def class_cost(logits: Tensor) -> Tensor:
    """Focal loss as a positive minus focal loss as a negative, element by element."""
    p = logits.sigmoid()
    positive = -FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * (p + 1e-8).log()
    negative = -(1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * (1 - p + 1e-8).log()
    return positive - negative


def box_cost(boxes: Tensor, truth: Tensor, scale: Tensor, s: DinoLossSettings) -> Tensor:
    """Weighted L1 and GIoU between boxes [G, Q, 4] and [G, M, 4] in images of `scale` [G, 4]: [G, Q, M]."""
    pairs = (*boxes.shape[:2], *truth.shape[1:])
    scale = scale[:, None]
    giou = giou_loss(
        (to_xyxy(boxes) * scale)[:, :, None].expand(pairs).reshape(-1, 4),
        (to_xyxy(truth) * scale)[:, None].expand(pairs).reshape(-1, 4),
    ).view(pairs[:3])
    return s.box_cost * torch.cdist(boxes, truth, p=1) + s.giou_cost * giou


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002, eq. 5), element by element, of finite logits and labels in 0..1."""
    p = logits.sigmoid()
    miss = p * (1 - labels) + (1 - p) * labels
    alpha = FOCAL_ALPHA * labels + (1 - FOCAL_ALPHA) * (1 - labels)
    return alpha * miss**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def class_loss(layer: Queries, matches: Matches, objects: Objects, weight: Tensor) -> Tensor:
    """Focal loss summed over queries, [G, T]. `weight` float [G, Q]: 0 for unused queries."""
    labels = torch.zeros_like(layer.logits)
    labels[matches.group, matches.query] = objects.labels[matches.object]
    logits = layer.logits.masked_fill(~objects.counted[:, None], 0.0)  # before the loss, since -inf * 0 is NaN
    return (focal_loss(logits, labels) * weight[..., None]).sum(1) * objects.counted


def box_loss(layer: Boxes, matches: Matches, objects: BoxTargets, s: DinoLossSettings) -> Tensor:
    """Weighted L1 of cxcywh in 0..1 and GIoU in pixels of each match: [K]."""
    predicted, truth = layer.boxes[matches.group, matches.query], objects.boxes[matches.object]
    scale = objects.scale[matches.group]
    giou = giou_loss(to_xyxy(predicted) * scale, to_xyxy(truth) * scale)
    return s.box_weight * (predicted - truth).abs().sum(-1) + s.giou_weight * giou
