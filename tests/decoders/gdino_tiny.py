"""Grounding DINO small enough for tests."""

from __future__ import annotations

from typing import Any

import torch

from lumen_ray.decoders.base import Pixels
from lumen_ray.decoders.grounding_dino import GroundingDinoDecoder
from lumen_ray.decoders.settings import GroundingDinoSettings
from lumen_ray.model.superlink import SuperLink

SWIN = {
    "image_size": 96, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
TINY = {
    "backbone": SWIN, "hidden_size": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn": 64,
    "decoder_ffn": 64, "num_queries": 20, "fusion_drop_path": 0.0, "mask_channels": 16,
}  # fmt: skip
LINK_CHANNELS = 24


def tiny_decoder(seed: int = 0, **changes: Any) -> GroundingDinoDecoder:
    torch.manual_seed(seed)
    return GroundingDinoDecoder(GroundingDinoSettings.model_validate(TINY | changes), LINK_CHANNELS)


def random_link(counts: list[int], images: list[int] | None = None, seed: int = 0) -> SuperLink:
    """`counts`: prompts of each group; `images`: the image of each group, by default its own."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    image = group if images is None else torch.tensor(images)[group]
    embeddings = torch.randn(len(group), LINK_CHANNELS, generator=generator)
    return SuperLink("grounding_dino", embeddings, image, torch.full_like(group, -1), group)


def random_pixels(extents: list[tuple[int, int]], size: tuple[int, int], seed: int = 0) -> Pixels:
    """Noise inside the extents, zero in the padding."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(extents), 3, *size, dtype=torch.uint8)
    for image, (height, width) in zip(images, extents, strict=True):
        image[:, :height, :width] = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return Pixels(images, torch.tensor(extents))
