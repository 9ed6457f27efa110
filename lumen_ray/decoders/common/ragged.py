"""Prompts of several images in one rectangular table, for products of matrices per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def place_in_group(groups: Tensor) -> Tensor:
    """0, 1, 2, ... within each group of sorted int64 [N]."""
    sizes = groups.bincount()
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(groups), device=groups.device) - starts[groups]


@dataclass
class Seats:
    """Where each of P prompts sits among those of its map: a table of B maps by S seats."""

    row: Tensor  # int64 [P]
    seat: Tensor  # int64 [P]
    shape: tuple[int, int]  # (B, S)

    @classmethod
    def of(cls, row: Tensor, maps: int) -> Seats:
        order = row.argsort(stable=True)
        seat = torch.empty_like(row)
        seat[order] = place_in_group(row[order])
        return cls(row, seat, (maps, int(seat.max()) + 1))

    def fill(self, values: Tensor) -> Tensor:
        """[P, C] -> [B, S, C], zero where nobody sits."""
        return values.new_zeros(*self.shape, values.shape[-1]).index_put((self.row, self.seat), values)

    def take(self, table: Tensor) -> Tensor:
        """[B, S, ...] -> [P, ...]"""
        return table[self.row, self.seat]
