"""Settings of the expert decoders. Importing this module loads no model code."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import Field, model_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError, suggest


class DinoSettings(Settings):
    """What the decoders on Grounding DINO's transformer share (arXiv 2303.05499); the defaults are Swin-T's."""

    backbone: dict[str, Any] = Field(
        default_factory=dict, description="keys of transformers.SwinConfig; those not given are Swin-T's"
    )
    hidden_size: int = Field(256, gt=0, multiple_of=32, description="width of the transformer; 32 groups normalise it")
    num_heads: int = Field(8, gt=0, multiple_of=2, description="heads; fusion and link self-attention have half")
    encoder_layers: int = Field(6, gt=0)
    decoder_layers: int = Field(6, gt=0)
    encoder_ffn: int = Field(2048, gt=0, description="inner width of the encoder; fusion and links have half")
    decoder_ffn: int = Field(2048, gt=0)
    encoder_points: int = Field(4, gt=0, description="points a head samples on each level in the encoder")
    decoder_points: int = Field(4, gt=0)
    num_queries: int = Field(900, gt=0, description="the most instances of all prompts of a group together")
    dropout: float = Field(0.0, ge=0, lt=1)
    fusion_drop_path: float = Field(0.1, ge=0, lt=1, description="share of groups that train without fusion")
    inverse_sigmoid_eps: float = Field(1e-5, gt=0, lt=0.5, description="how near to 0 and 1 a reference may come")

    @model_validator(mode="after")
    def _check_backbone(self) -> DinoSettings:
        if self.backbone:  # `transformers` takes unknown keys in silence
            from transformers import SwinConfig

            valid = {f.name for f in dataclasses.fields(SwinConfig)} | set(SwinConfig.attribute_map)
            for key in self.backbone:
                if key not in valid:
                    raise UserError(
                        f"unknown key 'backbone.{key}';{suggest(key, valid)} valid keys are those of "
                        "transformers.SwinConfig",
                        "invalid_config",
                    )
        return self

    @model_validator(mode="after")
    def _check_widths(self) -> DinoSettings:
        for name, width in (("hidden_size", self.hidden_size), ("encoder_ffn", self.encoder_ffn)):
            if width % self.num_heads:
                raise UserError(f"{name} {width} must be a multiple of num_heads {self.num_heads}", "invalid_config")
        return self


class GroundingDinoSettings(DinoSettings):
    """The expert detector and segmenter (see `decoders/grounding_dino.py`)."""

    mask_channels: int = Field(256, gt=0, description="width of the mask features")
    look_forward_twice: bool = Field(
        False, description="a layer's loss also trains the layer before it (DINO, arXiv 2203.03605, sec. 3.5)"
    )
    learned_class_scale: bool = Field(
        False,
        description="class logits get a learned scale and bias that start at 1/sqrt(hidden_size) and few objects; for "
        "training from scratch, published weights have none",
    )
