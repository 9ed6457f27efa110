"""An encoded batch of images: what all prompts about them share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lumen_ray.trunk.masks import prefix_segments


@dataclass
class Prefix:
    """An encoded image batch, shared by all prompts about it.

    In a conversation with several images a row has the keys and values of all, and the maps of the last one.
    """

    images: Tensor  # [B, 3, H, W] in 0..1
    merged: Tensor  # [B, C, h, w]
    dense: Tensor | None  # [B, channels, H/4, W/4]; None if no decoder reads it
    valid: Tensor  # bool [B], False for samples without an image
    cache: DynamicCache  # keys and values of the image tokens
    segments: Tensor  # int64 [length]: the image of a row that each token belongs to, -1 for the lead
    ends: Tensor  # int64 [B]: the position behind the last token

    @classmethod
    def without_images(cls, valid: Tensor, cache: DynamicCache, segments: Tensor, ends: Tensor) -> Prefix:
        """The prefix of branches that see no image."""
        none = torch.zeros(len(valid), 0, 0, 0, device=valid.device)
        return cls(none, none, None, valid, cache, segments, ends)

    @property
    def length(self) -> int:
        return len(self.segments)

    def select(self, rows: Sequence[int]) -> Prefix:
        """The prefix of some of the rows."""
        index = torch.tensor(rows, device=self.valid.device)
        cache = DynamicCache()
        for number, layer in enumerate(self._layers()):
            cache.update(layer.keys[index], layer.values[index], number)
        dense = None if self.dense is None else self.dense[index]
        maps = self.images[index], self.merged[index], dense
        return Prefix(*maps, self.valid[index], cache, self.segments, self.ends[index])

    @classmethod
    def concat(cls, prefixes: Sequence[Prefix]) -> Prefix:
        """The rows of several prefixes of one input size in one batch: the inverse of `select`."""
        first, cache = prefixes[0], DynamicCache()
        for number, layers in enumerate(zip(*(prefix._layers() for prefix in prefixes), strict=True)):
            keys, values = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
            cache.update(keys, values, number)
        dense = None if first.dense is None else torch.cat([p.dense for p in prefixes if p.dense is not None])
        images, merged, valid, ends = (
            torch.cat([getattr(prefix, name) for prefix in prefixes]) for name in ("images", "merged", "valid", "ends")
        )
        return cls(images, merged, dense, valid, cache, first.segments, ends)

    @property
    def nbytes(self) -> int:
        """Bytes of its maps, keys and values."""
        maps = [self.images, self.merged, *([] if self.dense is None else [self.dense])]
        layers = [tensor for layer in self._layers() for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in (*maps, *layers))

    def joined(self, rows: Sequence[int]) -> Prefix:
        """One row with the images of several, which are encoded as one conversation's (see `Trunk.encode`)."""
        image = self.segments == 0
        cache = DynamicCache()
        for number, layer in enumerate(self._layers()):
            keys, values = (
                torch.cat([stored[row] if not n else stored[row][:, image] for n, row in enumerate(rows)], dim=1)[None]
                for stored in (layer.keys, layer.values)
            )
            cache.update(keys, values, number)
        lead, each = int((~image).sum()), int(image.sum())
        segments = prefix_segments(lead, each, len(rows), self.segments.device)
        last = self.select(rows[-1:])
        return replace(last, cache=cache, segments=segments)

    def _layers(self) -> list[Any]:
        return list(self.cache.layers)

    def fork(self) -> DynamicCache:
        """A cache to extend. It shares keys and values, since the LLM appends by making new tensors."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache
