"""Floating-point operations of the Grounding DINO decoder."""

from __future__ import annotations

from torch import nn

from lumen_ray.decoders.common.flops import DecoderWork, products
from lumen_ray.decoders.dino.flops import Step
from lumen_ray.decoders.dino.transformer import cells
from lumen_ray.decoders.grounding_dino.decoder import GroundingDinoDecoder
from lumen_ray.structures import Size
from lumen_ray.targets import MASK_STRIDE


def count(decoder: GroundingDinoDecoder, work: DecoderWork) -> float:
    """FLOPs of a training step, forward and backward."""
    step, layers = Step.of(decoder, work), decoder.settings.decoder_layers
    queries = step.queries + step.denoising
    one = step.encoder() + sum(step.layer(i, queries, queries) for i in range(layers))
    masks = 0.0
    if shown := int((step.objects.mask >= 0).sum()):
        trained = shown * (layers * (1 + step.denoising / (2 * step.most_objects)))
        masks = _masks(decoder, step.groups.sizes, trained)
    return step.total(one, masks)


def _masks(decoder: GroundingDinoDecoder, sizes: list[Size], masks: float) -> float:
    """FLOPs of the mask features of every group's image, and of `masks` masks in all."""
    head, total = decoder.mask_head, 0.0
    for height, width in (cells(size, MASK_STRIDE) for size in sizes):
        convolutions = (m for m in head.modules() if isinstance(m, nn.Conv2d))
        total += sum(2.0 * height * width * conv.weight.numel() for conv in convolutions)
        total += masks / len(sizes) * 2.0 * height * width * decoder.settings.mask_channels
    return total + products(decoder.mask_embed, lambda _: masks)
