"""Contrastive denoising: queries that start from noisy copies of the objects (DINO, arXiv 2203.03605, sec. 3.3).

A positive copy, whose corners move by less than half its size, must reconstruct the object; a negative one, moved by
more, must predict no object. They need no matching, so they train the decoder from the first step.

Legend: G groups, T prompts, N objects, D denoising queries, Q matching queries, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lumen_ray.decoders.common.boxes import to_cxcywh, to_xyxy
from lumen_ray.decoders.dino.set_loss import Matches, Objects
from lumen_ray.decoders.dino.settings import DinoLossSettings

UNUSED, MATCHING = -2, -1  # round numbers of padding, and of queries that are matched


@dataclass
class Denoising:
    """Rounds of copies: each holds every object of its group once as a positive, then once as a negative."""

    content: Tensor  # [G, D, C]
    boxes: Tensor  # float32 [G, D, 4] cxcywh in 0..1
    round: Tensor  # int64 [G, D], `UNUSED` at padding
    rounds: Tensor  # int64 [G]: number of rounds of a group
    matches: Matches  # of the positives

    @property
    def weight(self) -> Tensor:
        """float32 [G, D]: the rounds of a group together weigh as much as its matching queries."""
        return (self.round >= 0) / self.rounds.clamp_min(1)[:, None]

    def blocked(self, query_valid: Tensor) -> Tensor:
        """bool [G, D + Q, D + Q]: True where a query (row) must not attend to another (column).

        Rounds do not attend to each other, and matching queries attend to none, which would leak the ground truth."""
        matching = torch.where(query_valid, MATCHING, UNUSED)
        rounds = torch.cat([self.round, matching], dim=1)
        return (rounds[:, :, None] != rounds[:, None]) & (rounds[:, None] != MATCHING)


def make_denoising(objects: Objects, links: Tensor, link_valid: Tensor, s: DinoLossSettings) -> Denoising | None:
    """As many rounds as fit into `denoising_queries`, at least one; None if there is no object.

    `links` [G, T, C]: the link embeddings before the encoder, the queries' content; `link_valid` bool [G, T]."""
    if not len(objects) or not s.denoising_queries:
        return None
    counts = objects.counts
    per_round = 2 * counts.clamp_min(1)
    rounds = (s.denoising_queries // per_round).clamp_min(1) * (counts > 0)
    place = torch.arange(int((rounds * per_round).max()), device=counts.device)
    used = place < (rounds * per_round)[:, None]
    in_round = place % per_round[:, None]
    starts = (counts.cumsum(0) - counts).clamp_max(len(objects) - 1)
    which = starts[:, None] + in_round % counts.clamp_min(1)[:, None]  # G D
    positive = used & (in_round < counts[:, None])
    group, query = torch.nonzero(positive, as_tuple=True)
    return Denoising(
        _content(objects, which, links, link_valid, s.label_noise),
        _noisy_boxes(objects.boxes[which], positive, s.box_noise),
        torch.where(used, place // per_round[:, None], UNUSED),
        rounds,
        Matches(group, query, which[positive]),
    )


def _content(objects: Objects, which: Tensor, links: Tensor, link_valid: Tensor, noise: float) -> Tensor:
    """The link of one of the object's prompts; with probability `noise` of any prompt of the group."""
    true = torch.multinomial(objects.labels[which.flatten()], 1).view(which.shape)
    other = torch.multinomial(link_valid.float(), which.shape[1], replacement=True)
    label = torch.where(torch.rand(which.shape, device=which.device) < noise, other, true)
    return links.gather(1, label[..., None].expand(-1, -1, links.shape[-1]))


def _noisy_boxes(boxes: Tensor, positive: Tensor, noise: float) -> Tensor:
    """Moves every corner by up to half the box's size (positives), or by half to the full size (negatives).

    Corners of negatives may cross; they are swapped, since a negative size would give them away."""
    half = (boxes[..., 2:] / 2).repeat(1, 1, 2)
    sign = torch.randint(0, 2, boxes.shape, device=boxes.device) * 2 - 1
    share = torch.rand(boxes.shape, device=boxes.device) + (~positive)[..., None]
    first, second = (to_xyxy(boxes) + sign * share * half * noise).clamp(0, 1).chunk(2, dim=-1)
    return to_cxcywh(torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1))
