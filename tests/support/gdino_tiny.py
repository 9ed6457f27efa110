"""Grounding DINO small enough for tests."""

from __future__ import annotations

from typing import Any

import torch

from lumen_ray.decoders.grounding_dino.decoder import GroundingDinoDecoder
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import PerceptionTargets, Pixels

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


def targets_of(boxes: list[list[list[float]]], side: int = 96, masks: bool = False) -> PerceptionTargets:
    """`boxes`: xyxy of every prompt's objects; with `masks` every object has one, which fills its box."""
    most = max([1, *map(len, boxes)])
    table = torch.zeros(len(boxes), most, 4)
    valid = torch.zeros(len(boxes), most, dtype=torch.bool)
    index = torch.full((len(boxes), most), -1)
    drawn = []
    for p, own in enumerate(boxes):
        for j, box in enumerate(own):
            table[p, j], valid[p, j] = torch.tensor(box), True
            if masks:
                index[p, j] = len(drawn)
                x1, y1, x2, y2 = (round(v / 4) for v in box)
                drawn.append(torch.zeros(side // 4, side // 4, dtype=torch.uint8))
                drawn[-1][y1:y2, x1:x2] = 255
    maps = torch.stack(drawn) if drawn else torch.zeros(0, side // 4, side // 4, dtype=torch.uint8)
    counted = torch.ones(len(boxes), dtype=torch.bool)
    keypoints = torch.zeros(len(boxes), most, 3)
    return PerceptionTargets(table, valid, torch.zeros_like(valid), index, maps, keypoints, counted)


def check_everything_learns(decoder, link: SuperLink, pixels: Pixels, targets: PerceptionTargets) -> None:
    """Every parameter and every link gets a gradient, but for biases that attention ignores."""
    link.embeddings.requires_grad_()
    sum(term.total for term in decoder.losses(link, pixels, targets).values()).backward()
    for name, parameter in [*decoder.named_parameters(), ("links", link.embeddings)]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    without = [name for name, p in decoder.named_parameters() if not p.grad.any()]
    assert all(name.endswith(("key.bias", "k_proj.bias")) for name in without), without  # softmax ignores them
    assert link.embeddings.grad.any(1).all()


def features_of_padded_input(decoder, pixels, pixel_mask):
    """`Levels` as in the references, whose backbone reads the padding as part of the image."""
    levels = decoder.trunk.extract_features(pixels, [tuple(pixels.shape[-2:])] * len(pixels))
    for level, m in enumerate(levels.sources):
        seen = torch.nn.functional.interpolate(pixel_mask[None].float(), size=m.shape[-2:])[0].bool()
        for shown, one in zip(levels.shown, seen, strict=True):
            shown[level] = int(one.any(1).sum()), int(one.any(0).sum())
    return levels
