"""Masks of a detection transformer's queries: dot products with features at stride 4 (MaskFormer, arXiv 2107.06278,
sec. 3.3; Mask DINO, arXiv 2206.02777, sec. 3.3)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.dino.memory import Levels, Memory
from lumen_ray.decoders.dino.transformer import STRIDES, GroupNorm, cells
from lumen_ray.input_size import by_size
from lumen_ray.targets import MASK_STRIDE


class MaskHead(nn.Module):
    """Mask features: the encoder's finest map, upsampled, plus the backbone's map at stride 4 (Mask DINO, eq. 1)."""

    def __init__(self, hidden_size: int, stride4_channels: int, mask_channels: int):
        super().__init__()
        self.lateral = nn.Conv2d(stride4_channels, hidden_size, 1, bias=False)
        self.lateral_norm = GroupNorm(hidden_size)
        self.output = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, bias=False)
        self.output_norm = GroupNorm(hidden_size)
        self.project = nn.Conv2d(hidden_size, mask_channels, 1)
        for conv in (self.lateral, self.output, self.project):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(cast(Tensor, self.project.bias))

    def forward(self, memory: Memory, levels: Levels, image: Tensor) -> Tensor:
        """[G, mask channels, h, w] at `MASK_STRIDE`, 0 at padding; `image` int64 [G] into `levels`.

        Images of each size are processed without padding, which would change the statistics of GroupNorm."""
        sizes = [levels.sizes[i] for i in image.tolist()]
        finest, stride4 = memory.finest, levels.stride4
        whole: Tensor | None = None
        for size, members in by_size(sizes).items():
            (rows, columns), (rows4, columns4) = cells(size, STRIDES[0]), cells(size, MASK_STRIDE)
            lateral = stride4[image[members], :, :rows4, :columns4].contiguous()
            coarse = finest[members, :, :rows, :columns]
            part = self._features(lateral, coarse)
            if whole is None:
                whole = part.new_zeros(len(sizes), part.shape[1], *stride4.shape[-2:])
            whole[members, :, :rows4, :columns4] = part
        assert whole is not None, "there is at least one group"
        return whole

    def _features(self, stride4: Tensor, coarse: Tensor) -> Tensor:
        x = self.lateral_norm(self.lateral(stride4))
        x = x + F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(F.relu(self.output_norm(self.output(x))))
