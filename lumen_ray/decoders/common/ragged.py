"""Prompts of several images in one padded table, for matrix products per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def place_in_group(groups: Tensor) -> Tensor:
    """Position 0, 1, 2, ... of each entry within its group; `groups`: sorted int64 [N]."""
    sizes = groups.bincount()
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(groups), device=groups.device) - starts[groups]


@dataclass
class Seats:
    """Row and column of each of P prompts in a padded table: B maps by at most S prompts of a map."""

    row: Tensor  # int64 [P]
    seat: Tensor  # int64 [P]
    shape: tuple[int, int]  # (B, S)

    @classmethod
    def of(cls, row: Tensor, maps: int) -> Seats:
        """Seats of prompts that belong to the maps `row` (int64 [P], 0..maps - 1), in order."""
        order = row.argsort(stable=True)
        seat = torch.empty_like(row)
        seat[order] = place_in_group(row[order])
        return cls(row, seat, (maps, int(seat.max()) + 1 if len(seat) else 0))

    def fill(self, values: Tensor) -> Tensor:
        """Scatters [P, C] -> [B, S, C], 0 at empty seats."""
        return values.new_zeros(*self.shape, values.shape[-1]).index_put((self.row, self.seat), values)

    def take(self, table: Tensor) -> Tensor:
        """Gathers [B, S, ...] -> [P, ...]."""
        return table[self.row, self.seat]
