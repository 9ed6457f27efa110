"""Keypoints of an instance: cross-attention of (instance, keypoint name) over the instance's box (Lumen, arXiv
2403.07304, sec. 3.3).

The position is the attention-weighted mean of the cells, a soft argmax relative to the box. Works for any number of
keypoints, given by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.lumen.aligner import sine_position

MARGIN = 1.25  # size of the sampled window relative to the box; keypoints may lie outside a truncated box


class PoseHead(nn.Module):
    """See the module's docstring."""

    def __init__(self, dense_channels: int, link_channels: int, channels: int, grid: int):
        super().__init__()
        self.grid = grid
        self.key_value = nn.Conv2d(dense_channels, 2 * channels, 1)
        self.query = nn.Sequential(nn.LayerNorm(link_channels), nn.Linear(link_channels, channels))
        self.instance = nn.Linear(channels, channels)
        hidden, last = nn.Linear(2 * channels, channels), nn.Linear(channels, 3)
        self.out = nn.Sequential(nn.LayerNorm(2 * channels), hidden, nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, dense: Tensor, boxes: Tensor, image_index: Tensor, links: Tensor) -> tuple[Tensor, Tensor]:
        """One keypoint of one instance per row.

        dense [B, D, H/4, W/4]; boxes [N, 4] xyxy in input pixels; image_index [N]; links [N, link_channels].
        Returns xy [N, 2] in input pixels and visibility logits [N].
        """
        if len(boxes) == 0:
            return boxes.new_zeros(0, 2), boxes.new_zeros(0)
        # keypoints of one instance share its window: sample it once
        _, first, window_of = unique_rows(torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1))
        windows, center, extent = self._sample(dense, boxes[first], image_index[first])
        position = sine_position(self.grid, self.grid, windows.shape[1] // 2, dense.device)
        key, value = windows.flatten(2).transpose(1, 2).chunk(2, dim=-1)  # W G*G C
        key = key + position
        query = self.query(links) + self.instance(value.mean(1))[window_of]
        attention = torch.softmax((key[window_of] @ query.unsqueeze(-1))[..., 0] * query.shape[-1] ** -0.5, dim=-1)
        line = (torch.arange(self.grid, device=dense.device) + 0.5) / self.grid - 0.5
        cells = torch.stack(torch.meshgrid(line, line, indexing="ij")[::-1], dim=-1).reshape(-1, 2)  # xy in -.5...5
        read = (attention.unsqueeze(1) @ value[window_of])[:, 0]
        out = self.out(torch.cat([read, query], dim=-1))
        relative = attention @ cells + 0.1 * torch.tanh(out[:, :2])
        return center[window_of] + relative * extent[window_of], out[:, 2]

    def _sample(self, dense: Tensor, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [W, 2C, G, G] on a grid over each box, its centre [W, 2] and extent [W, 2] in input pixels."""
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        extent = (boxes[:, 2:] - boxes[:, :2]).clamp_min(4) * MARGIN
        line = (torch.arange(self.grid, device=dense.device) + 0.5) / self.grid - 0.5
        y, x = torch.meshgrid(line, line, indexing="ij")
        points = center[:, None, None] + torch.stack([x, y], -1) * extent[:, None, None]
        size = 4 * torch.tensor([dense.shape[-1], dense.shape[-2]], device=dense.device)
        features = self.key_value(dense)
        sampled = [
            F.grid_sample(
                features[b : b + 1],
                (points[image_index == b] / size * 2 - 1).flatten(1, 2)[None],
                mode="bilinear",
                align_corners=False,
            )[0]
            .unflatten(2, (self.grid, self.grid))
            .transpose(0, 1)
            for b in range(len(dense))
        ]
        order = torch.cat([torch.nonzero(image_index == b).flatten() for b in range(len(dense))])
        return torch.cat(sampled)[order.argsort()], center, extent


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(unique rows, index of each unique row's first occurrence, inverse)."""
    unique, inverse = torch.unique(rows.detach(), dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(rows), device=rows.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(rows), device=rows.device), "amin")
    return unique, first, inverse
