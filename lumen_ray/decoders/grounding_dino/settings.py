"""Settings of the Grounding DINO decoder."""

from __future__ import annotations

from pydantic import Field

from lumen_ray.decoders.dino.settings import DinoLossSettings


class GroundingDinoSettings(DinoLossSettings):
    """The expert detector and segmenter (see `decoders/grounding_dino/decoder.py`)."""

    mask_channels: int = Field(256, gt=0, description="width of the mask features")
    mask_points: int = Field(12544, gt=3, description="sampled points per mask in the mask losses")
    mask_weight: float = Field(5.0, ge=0, description="loss: weight of the masks' cross entropy")
    dice_weight: float = Field(5.0, ge=0, description="loss: weight of the masks' dice loss")
