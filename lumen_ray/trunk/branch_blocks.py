"""Attention of many short branches behind one prefix.

Attention over the whole row would compute every product of two branches and mask it away. Here each branch attends to
the prefix and to itself alone: the cost grows with the number of branches instead of its square.

Legend: B rows, T branch tokens per row, P prefix tokens, M branches per row and L tokens per branch (padded), H
key-value heads, G query heads per key-value head, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen_ray.trunk.layout import Layout

#: Blocks are used where they save at least this share of the products; each costs more than one of torch's attention.
SAVING = 0.5
#: Attention weights that are computed at a time; with gradients all are kept.
MOST_WEIGHTS = 1 << 24


@dataclass
class BranchBlocks:
    """`tokens` int64 [B, M, L]: the column of each token of each branch, 0 at padding; `cells` int64 [B, T]: the cell
    in M * L of each token, 0 at padding; `hidden` bool [B, M, L, P]: prefix tokens that a token does not see, None if
    all see all; `prefix_allowed` bool [P, P], if the prefix is in the same pass: what each of its tokens attends to."""

    tokens: Tensor
    cells: Tensor
    hidden: Tensor | None
    prefix_allowed: Tensor | None = None
    attended: bool = False  # whether the LLM has called `attend`

    @classmethod
    def of(cls, layout: Layout, visible: Tensor, prefix_allowed: Tensor | None = None) -> BranchBlocks | None:
        """The blocks of a layout, None where they save little. `visible` bool [B, T, P]: the prefix tokens that each
        token sees."""
        filled = layout.branch_ids >= 0
        if not bool(filled.any()):
            return None
        number = ((layout.offsets == 0) & filled).cumsum(1) - 1
        most, length = int(number.max()) + 1, int(layout.offsets.max()) + 1
        rows, columns = filled.shape
        prefix = visible.shape[2]
        if most * length * (prefix + length) > (1 - SAVING) * columns * (prefix + columns):
            return None
        cells = torch.where(filled, number * length + layout.offsets, 0)
        row, column = torch.nonzero(filled, as_tuple=True)
        tokens = torch.zeros(rows, most * length, dtype=torch.int64, device=filled.device)
        tokens[row, cells[row, column]] = column
        hidden = None
        if prefix and not bool(visible[filled].all()):
            hidden = ~visible[torch.arange(rows, device=filled.device)[:, None], tokens].unflatten(1, (most, length))
        return cls(tokens.unflatten(1, (most, length)), cells, hidden, prefix_allowed)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, H * G, T, D], scaled; key and value [B, H, P + T, D] -> [B, T, H * G, D]. With the prefix in the
        same pass [B, H * G, P + T, D] -> [B, P + T, H * G, D]."""
        self.attended = True
        if self.prefix_allowed is None:
            return self._attend_all(query, key, value)
        prefix = len(self.prefix_allowed)
        of_prefix = F.scaled_dot_product_attention(
            query[:, :, :prefix],
            key[:, :, :prefix],
            value[:, :, :prefix],
            attn_mask=self.prefix_allowed,
            scale=1.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return torch.cat([of_prefix.transpose(1, 2), self._attend_all(query[:, :, prefix:], key, value)], dim=1)

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result of all branches: [B, T, H * G, D]."""
        rows, most, length = self.tokens.shape
        step = max(1, MOST_WEIGHTS // (query.shape[1] * rows * length * (key.shape[2] - query.shape[2] + length)))
        out = torch.cat([self._attend(query, key, value, slice(m, m + step)) for m in range(0, most, step)], dim=1)
        return out[torch.arange(rows, device=out.device)[:, None], self.cells]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, members: slice) -> Tensor:
        """The result of some branches' tokens: [B, M * L, H * G, D]."""
        tokens = self.tokens[:, members]
        rows, most, length = tokens.shape
        heads, prefix = key.shape[1], key.shape[2] - query.shape[2]
        # B H M L G D, so that all queries of a row are one matrix for the prefix, and those of a branch one for itself
        asked = _in_blocks(query.unflatten(1, (heads, -1)).permute(0, 3, 1, 2, 4), tokens).permute(0, 3, 1, 2, 4, 5)
        groups = asked.shape[4]
        own_key, own_value = (
            _in_blocks(stored[:, :, prefix:].transpose(1, 2), tokens).permute(0, 3, 1, 2, 4) for stored in (key, value)
        )  # B H M L D
        own = asked.flatten(3, 4) @ own_key.transpose(-1, -2)  # B H M L*G L
        later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1).repeat_interleave(groups, 0)
        own = own.masked_fill(later, torch.finfo(own.dtype).min)
        to_prefix = asked.flatten(2, 4) @ key[:, :, :prefix].transpose(-1, -2)  # B H M*L*G P
        to_prefix = to_prefix.view(rows, heads, most, length * groups, prefix)
        if self.hidden is not None:
            hidden = self.hidden[:, members].repeat_interleave(groups, 2)[:, None]
            to_prefix = to_prefix.masked_fill(hidden, torch.finfo(own.dtype).min)
        weights = torch.cat([to_prefix, own], dim=-1).float().softmax(-1).to(value.dtype)
        read = weights[..., prefix:] @ own_value
        of_prefix = weights[..., :prefix].flatten(2, 3) @ value[:, :, :prefix]
        read = (read + of_prefix.view_as(read)).unflatten(3, (length, groups))  # B H M L G D
        return read.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2, 3)


def _in_blocks(values: Tensor, tokens: Tensor) -> Tensor:
    """values [B, T, ...] at tokens [B, M, L] -> [B, M, L, ...]."""
    return values[torch.arange(len(values), device=values.device)[:, None, None], tokens]
