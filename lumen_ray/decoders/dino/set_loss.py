"""What a detection transformer should find, and the losses of a set of boxes (DETR, arXiv 2005.12872, sec. 3.1).

Legend: G groups, T prompts of the largest group, Q queries, N objects of all groups, M of the richest one, L stages
(the encoder's selection and the decoder's layers). Boxes are cxcywh in 0..1 of the image without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
NEVER = 1e6  # cost of a query that is none


class Queries(Protocol):
    """What a stage says of the queries: class logits float32 [G, Q, T], -inf at padded links; boxes [G, Q, 4]."""

    logits: Tensor
    boxes: Tensor


@dataclass
class Objects:
    """The objects to be found, group by group. One that several prompts of a group name is one, with several labels."""

    group: Tensor  # int64 [N], rising
    boxes: Tensor  # float32 [N, 4]
    labels: Tensor  # float32 [N, T], 1 at the prompts that name it
    mask: Tensor  # int64 [N] into `PerceptionTargets.masks`, or -1
    entry: Tensor  # int64 [N, 2]: (link, column) where the targets name it, first if several do
    counted: Tensor  # bool [G, T]: prompts that have detection targets
    scale: Tensor  # float32 [G, 4]: width, height, width, height of the groups' images in pixels

    def __len__(self) -> int:
        return len(self.group)

    @property
    def seats(self) -> Seats:
        """Row (group) and column of every object in a table of the groups."""
        return Seats.of(self.group, len(self.scale))

    @property
    def counts(self) -> Tensor:
        """int64 [G]"""
        return self.group.bincount(minlength=len(self.scale))


def find_objects(targets: PerceptionTargets, links: Tensor, seats: Seats, sizes: list[Size]) -> Objects:
    """`links` int64 [P']: the object prompts, `seats`: their places in [G, T]; `sizes`: (height, width) of each group's
    image without padding. Crowds are not among the objects."""
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
    """K queries and the object each should be: int64 [K] each."""

    group: Tensor
    query: Tensor
    object: Tensor


@torch.no_grad()
def match(stages: list[Queries], query_valid: Tensor, objects: Objects, s: DinoLossSettings) -> list[Matches]:
    """The cheapest assignment of objects to queries, stage by stage; an object goes without where queries are few."""
    device = objects.group.device
    if not len(objects):
        none = torch.empty(0, dtype=torch.int64, device=device)
        return [Matches(none, none, none)] * len(stages)
    allowed = query_valid[..., None]
    return [assign(_costs(stage, objects, s), allowed, objects.counts) for stage in stages]


def assign(costs: Tensor, allowed: Tensor, counts: Tensor) -> Matches:
    """The cheapest assignment in each group: costs [G, Q, M], of which the first `counts` (int64 [G]) columns are
    objects, group by group; `allowed` bool [G, Q, M or 1]: pairs that may be."""
    device = costs.device
    costs = costs.nan_to_num(NEVER, NEVER, NEVER)  # a loss that is none is found by the loop, with its samples
    table = costs.masked_fill(~allowed, NEVER).cpu().numpy()
    allowed, triples, start = allowed.expand_as(costs).cpu().numpy(), [], 0
    for group, count in enumerate(counts.tolist()):
        for query, place in zip(*linear_sum_assignment(table[group, :, :count]), strict=True):
            if allowed[group, query, place]:
                triples.append((group, int(query), start + int(place)))
        start += count
    return Matches(*torch.tensor(triples, dtype=torch.int64).view(-1, 3).to(device).unbind(1))


def _costs(stage: Queries, objects: Objects, s: DinoLossSettings) -> Tensor:
    """[G, Q, M]: class and boxes (Deformable DETR, arXiv 2010.04159)."""
    seats = objects.seats
    labels, wanted = seats.fill(objects.labels), seats.fill(objects.boxes)  # G M T, G M 4
    share = labels / labels.sum(-1, keepdim=True).clamp_min(1)
    kind = class_cost(stage.logits) @ share.transpose(1, 2)
    return s.class_cost * kind + box_cost(stage.boxes, wanted, objects.scale, s)


def class_cost(logits: Tensor) -> Tensor:
    """How much the focal loss grows when a query is an object, element by element."""
    p = logits.sigmoid()
    positive = -FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * (p + 1e-8).log()
    negative = -(1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * (1 - p + 1e-8).log()
    return positive - negative


def box_cost(boxes: Tensor, wanted: Tensor, scale: Tensor, s: DinoLossSettings) -> Tensor:
    """L1 and GIoU, weighted, of boxes [G, Q, 4] and [G, M, 4] in images of `scale` [G, 4]: [G, Q, M]."""
    pairs = (*boxes.shape[:2], *wanted.shape[1:])
    scale = scale[:, None]
    giou = giou_loss(
        (to_xyxy(boxes) * scale)[:, :, None].expand(pairs).reshape(-1, 4),
        (to_xyxy(wanted) * scale)[:, None].expand(pairs).reshape(-1, 4),
    ).view(pairs[:3])
    return s.box_cost * torch.cdist(boxes, wanted, p=1) + s.giou_cost * giou


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Element by element, of finite logits."""
    p = logits.sigmoid()
    miss = p * (1 - wanted) + (1 - p) * wanted
    alpha = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
    return alpha * miss**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def class_loss(stage: Queries, matches: Matches, objects: Objects, weight: Tensor) -> Tensor:
    """Focal loss summed over queries, [G, T]. `weight` float [G, Q]: 0 for queries that are none."""
    wanted = torch.zeros_like(stage.logits)
    wanted[matches.group, matches.query] = objects.labels[matches.object]
    logits = stage.logits.masked_fill(~objects.counted[:, None], 0.0)  # before the loss: -inf times 0 is no number
    return (focal_loss(logits, wanted) * weight[..., None]).sum(1) * objects.counted


def box_loss(stage: Queries, matches: Matches, objects: Objects, s: DinoLossSettings) -> Tensor:
    """L1 of cxcywh in 0..1 and GIoU in pixels, weighted, of each match: [K]."""
    predicted, wanted = stage.boxes[matches.group, matches.query], objects.boxes[matches.object]
    scale = objects.scale[matches.group]
    giou = giou_loss(to_xyxy(predicted) * scale, to_xyxy(wanted) * scale)
    return s.box_weight * (predicted - wanted).abs().sum(-1) + s.giou_weight * giou
