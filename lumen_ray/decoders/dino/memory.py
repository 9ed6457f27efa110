"""The image memory that queries attend to: multi-scale features of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.dino.deformable import Grid
from lumen_ray.structures import Size


@dataclass
class Levels:
    """Backbone features of B images: maps padded to the largest image."""

    sizes: list[Size]  # (height, width) of each image in input pixels, without padding
    shown: list[list[Size]]  # (rows, columns) of each image's maps at `STRIDES`, without padding
    sources: list[Tensor]  # [B, C, h, w] at `STRIDES`
    stride4: Tensor  # [B, backbone channels, h, w] at `MASK_STRIDE`


@dataclass
class Memory:
    """The encoder's output for G groups, with the geometry for attending to it.

    If all images have one size, tensors about places have one row for all groups: [1, ...] instead of [G, ...]."""

    vision: Tensor  # [G, S, C]
    links: Tensor  # [G, T, C]
    link_valid: Tensor  # bool [G, T]
    shapes: tuple[Size, ...]  # (rows, columns) of the levels
    shown: Tensor  # float32 [G, levels, 2]: columns and rows without padding
    padded: bool  # whether any map has padding

    @cached_property
    def grid(self) -> Grid:
        return Grid.of(self.shapes, self.vision.device)

    @cached_property
    def valid_ratios(self) -> Tensor:
        """float32 [G, levels, 2] (x, y): fraction of each map that is not padding."""
        return self.shown / self.grid.shape

    @cached_property
    def valid_size(self) -> Tensor:
        """float32 [G, S, 2]: columns and rows, without padding, of the level of each place."""
        return self.shown[:, self.grid.level]

    @cached_property
    def centers(self) -> Tensor:
        """float32 [G, S, 2] (x, y) of the places."""
        return (self.grid.place + 0.5) / self.valid_size

    @cached_property
    def vision_valid(self) -> Tensor | None:
        """bool [G, S]; None if there is no padding."""
        return (self.grid.place < self.valid_size).all(-1) if self.padded else None

    @cached_property
    def vision_mask(self) -> Tensor | None:
        """A bias, [G, 1, 1, S]; None if there is no padding."""
        valid = self.vision_valid
        return None if valid is None else mask_to_bias(valid, self.vision.dtype)[:, None, None]

    @cached_property
    def link_mask(self) -> Tensor:
        """A bias, [G, 1, 1, T]."""
        return mask_to_bias(self.link_valid, self.links.dtype)[:, None, None]

    @property
    def finest(self) -> Tensor:
        """[G, C, h, w] at the finest stride."""
        rows, columns = self.shapes[0]
        return self.vision[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
