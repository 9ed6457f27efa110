"""Keypoint queries: their assignment to instances, and their initial values (UniPose, arXiv 2310.08530, sec. 3.3).

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, N slots, K keypoints of the largest
skeleton, C channels. Boxes are cxcywh in 0..1 of the image without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoMLPPredictionHead

from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.decoder import Groups
from lumen_ray.decoders.dino.transformer import last_layer
from lumen_ray.superlink import SuperLink


@dataclass
class Skeletons:
    """The keypoint prompts of every object prompt, in order: `index` int64 [P', K] into the links, or -1."""

    index: Tensor

    @classmethod
    def of(cls, link: SuperLink, objects: Tensor) -> Skeletons:
        """`objects` int64 [P']: the links that are object prompts."""
        place = torch.full((len(link),), -1, dtype=torch.int64, device=objects.device)
        place[objects] = torch.arange(len(objects), device=objects.device)
        children = torch.nonzero(link.parent >= 0).flatten()
        if not len(children):
            return cls(objects.new_empty(len(objects), 0))
        seats = Seats.of(place[link.parent[children]], len(objects))
        index = objects.new_full(seats.shape, -1)
        index[seats.row, seats.seat] = children
        return cls(index)

    @property
    def valid(self) -> Tensor:
        """bool [P', K]"""
        return self.index >= 0

    def fill(self, values: Tensor) -> Tensor:
        """Gathers values [links, ...] -> [P', K, ...], 0 beyond the end of a skeleton."""
        table = values[self.index.clamp_min(0)]
        return table.masked_fill(~self.valid.view(*self.index.shape, *[1] * (table.dim() - 2)), 0)


@dataclass
class Slots:
    """Pairs of a query and an object prompt whose keypoints are predicted, best first; int64 [G, N] each."""

    query: Tensor
    seat: Tensor  # the prompt's column in [G, T]
    prompt: Tensor  # the prompt's index among all object prompts
    valid: Tensor  # bool; False where a group has fewer pairs than slots

    @classmethod
    def best(cls, scores: Tensor, groups: Groups, most: int) -> Slots:
        """The `most` highest `scores` [G, Q, T] of each group; pairs of -inf are excluded."""
        best = scores.flatten(1).topk(min(most, scores[0].numel()), dim=1)
        query, seat = best.indices // scores.shape[2], best.indices % scores.shape[2]
        return cls.at(query, seat, groups, best.values > float("-inf"))

    @classmethod
    def at(cls, query: Tensor, seat: Tensor, groups: Groups, valid: Tensor) -> Slots:
        row = groups.seats.row
        numbers = groups.seats.fill(torch.arange(len(row), device=row.device)[:, None])[..., 0]
        return cls(query, seat, numbers.gather(1, seat), valid)


class KeypointStart(nn.Module):
    """Initial values of keypoint queries: content from the link and the instance, and a size relative to the instance's
    box.

    At initialisation the instance contributes nothing and the size is half the box."""

    def __init__(self, channels: int, size_tables: tuple[int, ...]):
        super().__init__()
        self.instance = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.instance.weight)
        self.size = GroundingDinoMLPPredictionHead(channels, channels, 2, 3)
        for parameter in last_layer(self.size).parameters():
            nn.init.zeros_(parameter)
        self.size_tables = nn.ParameterList(torch.zeros(length, 2) for length in size_tables)

    def content(self, links: Tensor, instances: Tensor) -> Tensor:
        """links [G, N, K, C], instances [G, N, C] -> [G, N, K, C]."""
        return links + self.instance(instances)[:, :, None]

    def sizes(self, content: Tensor) -> Tensor:
        """content [G, N, K, C] -> float32 [G, N, K, 2] in 0..1."""
        logits = self.size(content).float()
        if len(self.size_tables):
            table = torch.cat(list(self.size_tables))[: logits.shape[2]]  # keypoints beyond the tables get 0
            logits = logits + nn.functional.pad(table, (0, 0, 0, logits.shape[2] - len(table)))
        return logits.sigmoid()
