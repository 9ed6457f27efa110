"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, sec. 4.1).

`transformers` samples level by level. Here all levels are stacked in one sheet, separated by a row of zeros, and
sampled at once: a third of the operations, the same result.

Legend: G groups, S places of all levels, Q queries, H heads, L levels, K points per head and level, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.grounding_dino import modeling_grounding_dino as hf

from lumen_ray.structures import Size


@dataclass(frozen=True)
class Grid:
    """Coordinates of the places of feature maps, level by level and row by row, and their positions in the sheet."""

    place: Tensor  # float32 [S, 2]: column and row of each place
    level: Tensor  # int64 [S]
    shape: Tensor  # float32 [L, 2]: columns and rows
    sheet: Size  # rows and columns of a sheet that holds all levels, one below the other
    cell: Tensor  # int64 [S]: index of each place in the flattened sheet
    scale: Tensor  # float32 [L, 1, 2]: extent of a level in the sheet's -1..1 (as for `grid_sample`)
    shift: Tensor  # float32 [L, 1, 2]: top left corner of a level, in the same
    low: Tensor  # float32 [L, 1, 2]: bounds beyond which a level samples only zeros, in the same
    high: Tensor  # float32 [L, 1, 2]

    @staticmethod
    @lru_cache(maxsize=64)
    @torch.inference_mode(False)
    def of(shapes: tuple[Size, ...], device: torch.device) -> Grid:
        """`shapes`: rows and columns of each level. Cached, since few image sizes recur."""
        rows, columns = (torch.tensor(sides, device=device) for sides in zip(*shapes, strict=True))
        count = rows * columns
        level = torch.arange(len(shapes), device=device).repeat_interleave(count)
        index = torch.arange(len(level), device=device) - (count.cumsum(0) - count)[level]
        x, y = index % columns[level], index // columns[level]
        start = (rows + 1).cumsum(0) - rows - 1
        width, height = int(columns.max()), int((rows + 1).sum()) - 1
        shape = torch.stack([columns, rows], dim=-1).float()
        corner = torch.stack([torch.zeros_like(start), start], dim=-1).float()
        unit = 2 / shape.new_tensor([width, height])
        bounds = (corner * unit - 1, (corner - 0.5) * unit - 1, (corner + shape + 0.5) * unit - 1)
        return Grid(
            torch.stack([x, y], dim=-1).float(), level, shape, (height, width), (y + start[level]) * width + x,
            (shape * unit)[:, None], *(bound[:, None] for bound in bounds),
        )  # fmt: skip


class DeformableAttention(hf.GroundingDinoMultiscaleDeformableAttention):
    """The attention of `transformers`, with its weights. `reference_points` [G, Q, L, 2] xy or [G, Q, L, 4] cxcywh, in
    0..1 of the maps; `attention_mask` bool [G, S] (False: values are 0) or None."""

    def forward(  # type: ignore[override]  # called by keyword; arguments that are not needed go to **_
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes_list: Sequence[Size] | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        assert reference_points is not None and spatial_shapes_list is not None, "every layer passes them"
        grid = Grid.of(tuple(spatial_shapes_list), hidden_states.device)
        queries = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        values = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            values = values * attention_mask[..., None]
        weights = self.attention_weights(queries).unflatten(-1, (self.n_heads, -1)).softmax(-1)  # G Q H LK
        sampled = self._sample(values, self._points(queries, reference_points, grid), grid)  # GH C/H Q LK
        read = (sampled * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output_proj(read.view(len(queries), self.d_model, -1).transpose(1, 2)), None

    def _points(self, queries: Tensor, reference: Tensor, grid: Grid) -> Tensor:
        """The queries' sampling points, [G, Q, H, L, K, 2] in the sheet's -1..1."""
        offsets = self.sampling_offsets(queries).unflatten(-1, (self.n_heads, self.n_levels, self.n_points, 2))
        reference = reference[:, :, None, :, None]
        start = torch.addcmul(grid.shift, reference[..., :2], grid.scale)
        if reference.shape[-1] == 2:
            reach = grid.scale / grid.shape[:, None]  # offsets are in cells
        else:
            reach = reference[..., 2:] * grid.scale * (0.5 / self.n_points)  # offsets are fractions of the box
        return torch.clamp(torch.addcmul(start, offsets, reach), grid.low, grid.high)

    def _sample(self, values: Tensor, points: Tensor, grid: Grid) -> Tensor:
        """Samples values [G, S, C] at `points` -> [G * H, C / H, Q, L * K]."""
        values = values.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # G H S C/H
        sheet = values.new_zeros(*values.shape[:2], grid.sheet[0] * grid.sheet[1], values.shape[-1])
        sheet = sheet.index_copy(2, grid.cell, values).flatten(0, 1).unflatten(1, grid.sheet).permute(0, 3, 1, 2)
        points = points.transpose(1, 2).flatten(3, 4).flatten(0, 1)
        return F.grid_sample(sheet, points, mode="bilinear", padding_mode="zeros", align_corners=False)
