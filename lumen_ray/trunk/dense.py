"""The shared dense features: Lumen's task-agnostic representation (arXiv 2403.07304, sec. 3.2), at stride 4.

A small convolutional stem on pixels contributes resolution; the vision branch's merged map and the LLM's hidden states
at the image tokens contribute semantics. They are fused top-down as in a feature pyramid (FPN, arXiv 1612.03144).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, GroupNorm, SiLU. Not BatchNorm: an image's result must not depend on its batch."""
    groups = next(g for g in (8, 4, 2, 1) if out_channels % g == 0)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(groups, out_channels),
        nn.SiLU(),
    )


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.Sequential(conv_block(channels, channels), conv_block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


class DownBlock(nn.Module):
    """Halves the resolution: a strided convolution block plus a linear path (1x1 convolution of the 2x2 means).

    The linear path keeps simple cues such as colour linearly readable; without it, matching words with places would
    have to learn both factors of a product from scratch.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = conv_block(in_channels, out_channels, stride=2)
        self.linear = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.linear(F.avg_pool2d(x, 2))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class ConvStem(nn.Module):
    """images -> features of c, 2c and 3c channels at strides 4, 8 and 16."""

    widths: tuple[int, int, int]

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        self.widths = (c, 2 * c, 3 * c)
        self.down4 = nn.Sequential(conv_block(3, c // 2, stride=2), conv_block(c // 2, c, stride=2))
        self.down8 = nn.Sequential(conv_block(c, 2 * c, stride=2), ResidualBlock(2 * c))
        self.down16 = nn.Sequential(conv_block(2 * c, 3 * c, stride=2), ResidualBlock(3 * c))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B, 3, H, W] in 0..1."""
        s4 = self.down4(images - 0.5)
        s8 = self.down8(s4)
        return s4, s8, self.down16(s8)


class DenseFeatures(nn.Module):
    """images, stem features, merged map and LLM states -> dense features [B, channels, H/4, W/4]."""

    def __init__(self, stem_widths: tuple[int, int, int], channels: int, vision_width: int, llm_width: int):
        super().__init__()
        c4, c8, c16 = stem_widths
        self.from_vision = nn.Sequential(nn.GroupNorm(1, vision_width), nn.Conv2d(vision_width, channels, 1))
        self.from_llm = nn.Sequential(nn.GroupNorm(1, llm_width), nn.Conv2d(llm_width, channels, 1))
        self.lateral16 = nn.Conv2d(c16, channels, 1)
        self.lateral8 = nn.Conv2d(c8, channels, 1)
        self.lateral4 = nn.Conv2d(c4 + 3, channels, 1)  # stem and mean colour of each cell
        self.fuse16 = ResidualBlock(channels)
        self.fuse8 = ResidualBlock(channels)
        self.fuse4 = conv_block(channels, channels)

    def forward(
        self,
        images: Tensor,
        stem: tuple[Tensor, Tensor, Tensor],
        merged: Tensor,
        llm_states: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """images [B, 3, H, W] in 0..1 and their `stem` features; merged [B, C, h, w]; llm_states [B, P, llm_width] at
        the image tokens, row by row on a `grid` of (rows, columns)."""
        s4, s8, s16 = stem
        states = llm_states.transpose(1, 2).reshape(len(images), -1, *grid).contiguous()
        tokens = _resize(self.from_vision(merged), s16) + _resize(self.from_llm(states), s16)
        x = self.fuse16(self.lateral16(s16) + tokens)
        x = self.fuse8(self.lateral8(s8) + F.interpolate(x, s8.shape[-2:], mode="nearest"))
        s4 = torch.cat([s4, F.avg_pool2d(images, 4) * 4 - 2], dim=1)  # the stem's normalisation removes plain colour
        x = self.lateral4(s4) + F.interpolate(x, s4.shape[-2:], mode="nearest")
        return x + self.fuse4(x)
