"""Floating-point operations of Grounding DINO's transformer with link embeddings.

The backbone is counted by torch's FLOP counter; the transformer's layers, whose numbers of rows change from step to
step, from the sizes of their matrices.

Legend: B images, G groups, T prompts of the largest group, S places of all levels, Q queries, D denoising queries, N
slots, K keypoints of the largest skeleton, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lumen_ray.decoders.common.flops import DecoderWork, is_trainable, library_flops, products
from lumen_ray.decoders.dino.decoder import DinoDecoder, Groups
from lumen_ray.decoders.dino.set_loss import Objects, find_objects
from lumen_ray.decoders.dino.transformer import STRIDES, cells
from lumen_ray.structures import Size
from lumen_ray.targets import MASK_STRIDE


def backbone(decoder: DinoDecoder, work: DecoderWork, sizes: Sequence[Size]) -> float:
    """FLOPs of the backbone and its projections for images of (height, width) `sizes` in pixels: proportional to their
    area, since attention windows have a fixed size."""
    counter = library_flops(decoder, work.build)
    side = STRIDES[-1] * 4
    shape = (1, 3, side, side)
    if decoder.settings.features == "trunk":
        shape = (1, decoder.trunk.stride4_channels, side // MASK_STRIDE, side // MASK_STRIDE)
    one = counter.count("backbone", lambda: counter.module.trunk.extract_features(torch.empty(shape), [(side, side)]))
    return one * sum(height * width for height, width in sizes) / side**2


def _encoder_layer(layer: Any, places: float, prompts: float, width: int) -> float:
    """Fusion, self-attention of links, self-attention of pixels; one group. `layer`: an `EncoderLayer`."""
    inner = layer.fusion_layer.attn.embed_dim
    linear = products(layer, lambda name: prompts if "text" in name else places)
    return linear + 6.0 * places * prompts * inner + 4.0 * prompts**2 * width


def _decoder_layer(layer: Any, queries: float, block: float, prompts: float, places: float, width: int) -> float:
    """Self-attention of queries in blocks of `block`, then cross-attention to links and to pixels; one group."""

    def rows(name: str) -> float:
        if name.startswith("encoder_attn_text") and name.endswith(("key", "value")):
            return prompts
        return places if name == "encoder_attn.value_proj" else queries

    return products(layer, rows) + 4.0 * queries * (block + prompts) * width


@dataclass(frozen=True)
class Step:
    """The shapes of one training step; groups are padded to the largest, as in the forward pass."""

    decoder: DinoDecoder
    work: DecoderWork
    groups: Groups
    objects: Objects

    @classmethod
    def of(cls, decoder: DinoDecoder, work: DecoderWork) -> Step:
        groups = Groups.of(work.link, work.pixels)
        return cls(decoder, work, groups, find_objects(work.targets, groups.objects, groups.seats, groups.sizes))

    @property
    def num_groups(self) -> int:
        return self.groups.seats.shape[0]

    @property
    def prompts(self) -> int:
        return self.groups.seats.shape[1]

    @property
    def most_objects(self) -> int:
        """Number of objects of the largest group."""
        return int(self.objects.counts.max()) if len(self.objects) else 0

    @property
    def denoising(self) -> int:
        """Denoising queries of a group."""
        most, queries = self.most_objects, self.decoder.settings.denoising_queries
        return max(queries, 2 * most) if most and queries else 0

    @property
    def places(self) -> int:
        height, width = (max(sides) for sides in zip(*self.groups.sizes, strict=True))
        maps = (cells((height, width), stride) for stride in STRIDES)
        return sum(rows * columns for rows, columns in maps)

    @property
    def queries(self) -> int:
        return min(self.decoder.settings.num_queries, self.places)

    def encoder(self) -> float:
        """Encoder and two-stage selection of one group."""
        trunk, places, c = self.decoder.trunk, self.places, self.decoder.settings.hidden_size
        total = sum(_encoder_layer(each, places, self.prompts, c) for each in trunk.encoder.layers)
        total += sum(products(m, lambda _: places) for m in (trunk.enc_output, trunk.encoder_output_bbox_embed))
        return total + 2.0 * places * self.prompts * c

    def layer(self, index: int, queries: float, block: float) -> float:
        """A decoder layer and its heads on `queries` of one group; self-attention in blocks of `block`."""
        decoder, trunk, c = self.decoder, self.decoder.trunk, self.decoder.settings.hidden_size
        heads = (trunk.decoder.reference_points_head, decoder.bbox_embed, decoder.bbox_embed)
        total = sum(products(head, lambda _: queries) for head in heads) + 2.0 * queries * self.prompts * c
        return total + _decoder_layer(trunk.decoder.layers[index], queries, block, self.prompts, self.places, c)

    def total(self, one: float, all_groups: float = 0.0) -> float:
        """Forward and backward FLOPs of the step. `one`: forward FLOPs of a group's transformer; `all_groups`: those
        computed for all groups together."""
        trunk, groups = self.decoder.trunk, self.groups
        trained = is_trainable(trunk.encoder) or is_trainable(trunk.decoder)
        passed = self.work.needs_input_grad or trained or is_trainable(trunk.backbone)
        images = [groups.sizes[groups.image.tolist().index(i)] for i in range(len(groups.shown))]
        encoded = backbone(self.decoder, self.work, images) * (3 if is_trainable(trunk.backbone) else 1)
        return encoded + (self.num_groups * one + all_groups) * (1 + passed + trained)
