"""The image memory that queries read: multi-scale features of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.dino.deformable import Grid
from lumen_ray.structures import Size


@dataclass
class Levels:
    """What the backbone says of B images: maps padded to the largest image."""

    sizes: list[Size]  # (height, width) of each image in input pixels, without padding
    shown: list[list[Size]]  # (rows, columns) of each image's maps at `STRIDES`, without padding
    sources: list[Tensor]  # [B, C, h, w] at `STRIDES`
    stride4: Tensor  # [B, backbone channels, h, w] at `MASK_STRIDE`


@dataclass
class Memory:
    """The encoder's output for G groups, and what is needed to look at it.

    Where all images have one size, what is about places has one row for all groups, [1, ...] for [G, ...]."""

    vision: Tensor  # [G, S, C]
    links: Tensor  # [G, T, C]
    link_valid: Tensor  # bool [G, T]
    shapes: tuple[Size, ...]  # (rows, columns) of the levels
    shown: Tensor  # float32 [G, levels, 2]: columns and rows without padding
    padded: bool  # whether any image leaves some of its maps empty

    @cached_property
    def grid(self) -> Grid:
        return Grid.of(self.shapes, self.vision.device)

    @cached_property
    def valid_ratios(self) -> Tensor:
        """float32 [G, levels, 2] (x, y): share of each map that shows the image."""
        return self.shown / self.grid.shape

    @cached_property
    def own_size(self) -> Tensor:
        """float32 [G, S, 2]: columns and rows, without padding, of the map that each place is on."""
        return self.shown[:, self.grid.level]

    @cached_property
    def centers(self) -> Tensor:
        """float32 [G, S, 2] (x, y) of the places."""
        return (self.grid.place + 0.5) / self.own_size

    @cached_property
    def vision_valid(self) -> Tensor | None:
        """bool [G, S], None where nothing is padding."""
        return (self.grid.place < self.own_size).all(-1) if self.padded else None

    @cached_property
    def vision_mask(self) -> Tensor | None:
        """A bias, [G, 1, 1, S], None where nothing is padding."""
        return mask_to_bias(self.vision_valid, self.vision.dtype)[:, None, None] if self.padded else None

    @cached_property
    def link_mask(self) -> Tensor:
        """A bias, [G, 1, 1, T]."""
        return mask_to_bias(self.link_valid, self.links.dtype)[:, None, None]

    @property
    def finest(self) -> Tensor:
        """[G, C, h, w] at the finest stride."""
        rows, columns = self.shapes[0]
        return self.vision[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
