"""Settings of decoders built on Grounding DINO's transformer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lumen_ray.decoders.spec import DecoderSettings, Reads
from lumen_ray.errors import UserError, suggest
from lumen_ray.input_size import ShortSide


class DinoSettings(DecoderSettings):
    """Grounding DINO's transformer (arXiv 2303.05499); the defaults are those of Swin-T."""

    features: Literal["backbone", "trunk"] = Field(
        "backbone",
        description="where the image features come from: a backbone of the decoder's own, as published, or the trunk's "
        "dense features, which a decoder for new classes need not learn again",
    )
    backbone: dict[str, Any] = Field(
        default_factory=dict, description="keys of transformers.SwinConfig; defaults are Swin-T's"
    )
    hidden_size: int = Field(256, gt=0, multiple_of=32, description="width of the transformer; GroupNorm has 32 groups")
    wide_links: bool = Field(
        False,
        description="links have the model's link_channels instead of hidden_size; a new link head then starts as a "
        "copy of that of a trained decoder of the model, whose links tell its classes apart",
    )
    num_heads: int = Field(
        8, gt=0, multiple_of=2, description="attention heads; fusion and link self-attention have half as many"
    )
    encoder_layers: int = Field(6, gt=0)
    decoder_layers: int = Field(6, gt=0)
    encoder_ffn: int = Field(2048, gt=0, description="feed-forward width of the encoder; fusion and links have half")
    decoder_ffn: int = Field(2048, gt=0)
    encoder_points: int = Field(4, gt=0, description="sampling points per head and level in the encoder")
    decoder_points: int = Field(4, gt=0)
    num_queries: int = Field(900, gt=0, description="maximum number of instances of all prompts of a group together")
    dropout: float = Field(0.0, ge=0, lt=1)
    fusion_drop_path: float = Field(0.1, ge=0, lt=1, description="probability that a group skips fusion in training")
    inverse_sigmoid_eps: float = Field(
        1e-5, gt=0, lt=0.5, description="clamp of reference coordinates, away from 0 and 1"
    )
    input_size: tuple[int, int] | None = Field(
        None,
        description="[short, long]: resizes an image's shorter side to `short` pixels, or less where the longer side "
        "would exceed `long`; published weights use [800, 1333]. null: the trunk's input",
    )

    @field_validator("input_size")
    @classmethod
    def _ordered(cls, sides: tuple[int, int] | None) -> tuple[int, int] | None:
        if sides is not None and not 0 < sides[0] <= sides[1]:
            raise UserError(
                f"give [short, long] in pixels with 0 < short <= long, e.g. [800, 1333], got {list(sides)}",
                "invalid_config",
            )
        return sides

    @property
    def input_rule(self) -> ShortSide | None:
        return None if self.input_size is None else ShortSide(*self.input_size)

    def source(self, reads: Reads) -> Reads:
        return "dense" if self.features == "trunk" else reads

    @property
    def tile(self) -> int:
        return 32 if self.features == "trunk" else 1  # the maps halve dense features down to stride 32

    def link_width(self, link_channels: int) -> int:
        return link_channels if self.wide_links else self.hidden_size

    def weight_semantics(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "inverse_sigmoid_eps": self.inverse_sigmoid_eps}

    @model_validator(mode="after")
    def _check_features(self) -> DinoSettings:
        if self.features == "trunk" and (self.backbone or self.input_size):
            given = "a backbone" if self.backbone else "an input_size"
            raise UserError(f"features 'trunk' leaves no use for {given}; leave one of the two out", "invalid_config")
        return self

    @model_validator(mode="after")
    def _check_backbone(self) -> DinoSettings:
        if self.backbone:  # `transformers` ignores unknown keys silently
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


_TWICE = "a layer's loss also trains the layer before it (DINO, arXiv 2203.03605, sec. 3.5)"


class DinoLossSettings(DinoSettings):
    """Matching, losses and denoising of DINO's box predictions."""

    class_cost: float = Field(2.0, ge=0, description="matching: weight of the class")
    box_cost: float = Field(5.0, ge=0, description="matching: weight of L1 between boxes")
    giou_cost: float = Field(2.0, ge=0, description="matching: weight of GIoU")
    class_weight: float = Field(2.0, ge=0, description="loss: weight of the class")
    box_weight: float = Field(5.0, ge=0, description="loss: weight of L1 between boxes")
    giou_weight: float = Field(2.0, ge=0, description="loss: weight of GIoU")
    auxiliary_matches: int = Field(
        1,
        gt=0,
        description="queries matched to each object in the encoder's selection and in all layers but the last: more "
        "places learn from few images, and the last layer learns to leave out duplicates (H-DETR, arXiv 2207.13080)",
    )
    denoising_queries: int = Field(
        200, ge=0, description="denoising queries (noisy copies of the objects) of a training step; 0: none"
    )
    label_noise: float = Field(0.25, ge=0, le=1, description="share of the copies with the link of a random prompt")
    box_noise: float = Field(1.0, ge=0, description="noise of the copies' corners, in units of half their size")
    pixels_at_once: int = Field(
        1 << 23,
        gt=0,
        description="groups processed together in a training step, in image pixels; larger batches are processed in "
        "chunks, with activations recomputed in the backward pass",
    )
    look_forward_twice: bool = Field(False, description=_TWICE)
    learned_class_scale: bool = Field(
        False,
        description="class logits have a learned scale and bias, initialised to 1/sqrt(hidden_size) and a prior of few "
        "objects; for training from scratch, published weights have none",
    )
