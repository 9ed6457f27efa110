"""Toy decoders of every other kind: one that reads pixels, one that reads nothing but links, and one that draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lumen_ray.decoders.base import ImageDecoder, LossTerm
from lumen_ray.decoders.spec import DecoderSettings, DecoderSpec, TrunkShape
from lumen_ray.input_size import PictureSize, ShortSide
from lumen_ray.structures import SampleSettings
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, Pixels
from support.toy_decoder import SPEC, ToyDecoder, ToyRaw, ToySettings

MODULE = "support.toy_variants"


class PixelSettings(ToySettings):
    @property
    def input_rule(self) -> ShortSide:
        return ShortSide(48, 96)


PIXELS = replace(
    SPEC, name="toy_pixels", reads="pixels", settings=PixelSettings, decoder=f"{MODULE}:PixelDecoder",
    losses={"pixels_present": "objects", "pixels_box": "objects"},
)  # fmt: skip
BLIND = replace(
    SPEC, name="toy_blind", reads=None, decoder=f"{MODULE}:BlindDecoder",
    losses={"blind_present": "objects", "blind_box": "objects"},
)  # fmt: skip


class _Toy(ToyDecoder):
    """Gives the losses their names in the spec."""

    def loss(self, raw: ToyRaw, targets: Any) -> dict[str, LossTerm]:
        return dict(zip(self.spec.losses, super().loss(raw, targets).values(), strict=True))


class PixelDecoder(_Toy):
    """Reads the mean colour of the image, in an input size of its own."""

    spec = PIXELS

    @classmethod
    def build(cls, settings: ToySettings, shape: TrunkShape) -> PixelDecoder:
        return cls(settings, 3, settings.link_width(shape.link_channels))

    def forward(self, link: SuperLink, pixels: Pixels) -> ToyRaw:
        height, width = (side // 4 for side in pixels.images.shape[-2:])
        return super().forward(link, nn.functional.adaptive_avg_pool2d(pixels.images.float() / 255, (height, width)))


class BlindDecoder(_Toy):
    """Guesses from the words alone."""

    spec = BLIND

    @classmethod
    def build(cls, settings: ToySettings, shape: TrunkShape) -> BlindDecoder:
        return cls(settings, 1, settings.link_width(shape.link_channels))

    def forward(self, link: SuperLink, nothing: None) -> ToyRaw:
        assert nothing is None
        return super().forward(link, link.embeddings.new_zeros(int(link.image_index.max()) + 1, 1, 16, 16))


class DrawerSettings(DecoderSettings):
    @property
    def input_rule(self) -> PictureSize:
        return PictureSize(32, 64, 16)


DRAWER = DecoderSpec(
    name="toy_drawer",
    family="generation",
    tasks=("generate",),
    reads=None,
    losses={"drawn": "batches"},
    settings=DrawerSettings,
    decoder=f"{MODULE}:Drawer",
    link_head=f"{MODULE}:drawer_head",
    flops="support.toy_decoder:count_flops",
)


class DrawerHead(nn.Module):
    vocabulary = None

    def __init__(self, width: int):
        super().__init__()
        self.colour = nn.Linear(width, 3)

    def forward(self, states: Tensor, words: Tensor | None = None, parents: Tensor | None = None) -> Tensor:
        return self.colour(states)


def drawer_head(settings: DrawerSettings, shape: TrunkShape) -> DrawerHead:
    return DrawerHead(shape.llm_width)


class Drawer(ImageDecoder):
    """Fills the picture with one colour."""

    spec = DRAWER

    @classmethod
    def build(cls, settings: DrawerSettings, shape: TrunkShape) -> Drawer:
        return cls()

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def losses(self, link: SuperLink, view: None, targets: ImageTargets) -> dict[str, LossTerm]:
        assert view is None and targets.images.shape[-2:] == (32, 32)
        colour = targets.images.float().mean((2, 3)) / 255
        apart = (link.embeddings.mean(1) * self.gain - colour).square()
        return {"drawn": LossTerm(apart.sum(), torch.tensor(float(apart.numel())))}

    def sample(self, link: SuperLink, view: None, settings: SampleSettings) -> Tensor:
        colour = (link.embeddings.mean(1) * self.gain * 255).clamp(0, 255).to(torch.uint8)
        return colour[:, :, None, None].repeat_interleave(settings.num_images, 0).expand(-1, -1, 32, 32).contiguous()
