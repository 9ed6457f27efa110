"""Settings of the expert decoders. Keys of library configs are passed to the library's classes unchanged, so any size
of the same classes can be described. Importing this module loads no model code."""

from __future__ import annotations

import dataclasses
import inspect
import math
from functools import lru_cache
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from lumen_ray.config import Settings
from lumen_ray.decoders.sizes import PictureSize, ShortSide
from lumen_ray.errors import UserError, suggest

Sampler = Literal[
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
_PIPELINE_STEP = 8  # height and width that `diffusers`' pipelines take are multiples of it, whatever the VAE


@lru_cache
def _default(name: str, key: str) -> Any:
    """What a class of `diffusers` has for a key where nothing is said."""
    import diffusers

    return inspect.signature(getattr(diffusers, name).__init__).parameters[key].default


class DiffusionSettings(Settings):
    """What the decoders that make pictures share (see `decoders/diffusion.py`)."""

    image_size: int = Field(
        gt=0,
        description="side in pixels of a square picture; others, to learn from or to edit, have about as many pixels "
        "in their own shape",
    )
    max_image_size: int = Field(1024, gt=0, description="longest side in pixels a request may ask for")
    unet: dict[str, Any] = Field(description="keys of diffusers.UNet2DConditionModel")
    vae: dict[str, Any] = Field(description="keys of diffusers.AutoencoderKL")
    text_encoder: dict[str, Any] | None = Field(
        None,
        description="keys of transformers.CLIPTextConfig: captions as it encodes them are what links learn to say, and "
        "its '' is the empty condition; null learns an empty condition instead",
    )
    scheduler: dict[str, Any] = Field(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
        },
        description="the noise schedule: keys of diffusers' schedulers; each takes those it has",
    )
    sampler: Sampler = Field("DDIMScheduler", description="scheduler of diffusers that pictures are drawn with")
    guidance: float = Field(
        7.5, ge=0, le=100, description="how strictly a text is followed where a request says nothing"
    )
    num_tokens: int = Field(77, gt=0, description="tokens of a condition, as the link head gives them")
    mapper_heads: int = Field(8, gt=0, description="attention heads of the link head's transformer")
    mapper_layers: int = Field(1, gt=0, description="layers of its encoder, and of its decoder")
    align_weight: float = Field(0.1, ge=0, description="MSE of links and encoded captions, beside that of the noise")
    train_unet: bool = Field(description="whether the UNet learns, or only what conditions it")
    train_vae: bool = Field(False, description="whether the VAE learns to reproduce the target pictures")
    vae_weight: float = Field(1.0, gt=0, description="of the VAE's loss; the other losses do not reach the VAE")
    vae_kl_weight: float = Field(1e-3, ge=0, description="KL per latent value beside the reconstruction")
    vae_images: int = Field(4, gt=0, description="pictures of a batch that the VAE learns from; it needs the most time")

    @model_validator(mode="after")
    def _limit(self) -> DiffusionSettings:
        if self.max_image_size < self.image_size:
            raise UserError(
                f"max_image_size {self.max_image_size} must be at least image_size {self.image_size}", "invalid_config"
            )
        return self

    @property
    def step(self) -> int:
        """What height and width of a picture are multiples of: UNet and VAE halve it again and again."""
        parts = (("AutoencoderKL", self.vae), ("UNet2DConditionModel", self.unet))
        blocks = [len(keys.get("block_out_channels") or _default(name, "block_out_channels")) for name, keys in parts]
        return math.lcm(2 ** (sum(blocks) - 2), _PIPELINE_STEP)

    @property
    def latent_scale(self) -> float:
        """What the VAE's latents are multiplied by for the UNet."""
        return self.vae.get("scaling_factor", _default("AutoencoderKL", "scaling_factor"))

    @property
    def own_size(self) -> PictureSize:
        """The size of the pictures it learns from and edits."""
        return PictureSize(self.image_size, self.max_image_size, self.step)


class StableDiffusionSettings(DiffusionSettings):
    """Text to image (see `decoders/stable_diffusion.py`). VisionLLM v2 keeps the published UNet as it is."""

    train_unet: bool = Field(False, description="whether the UNet learns, or only what conditions it")
    drop_text: float = Field(0.2, ge=0, lt=1, description="share of prompts trained with the empty condition")


class InstructPix2PixSettings(DiffusionSettings):
    """Edits (see `decoders/instruct_pix2pix.py`). VisionLLM v2 goes on training the published UNet."""

    train_unet: bool = Field(True, description="whether the UNet learns, or only what conditions it")
    image_guidance: float = Field(
        1.5, ge=1, le=100, description="how much of a picture is kept where a request says nothing"
    )
    drop_text: float = Field(0.05, ge=0, description="share of edits trained without their instruction")
    drop_both: float = Field(0.05, ge=0, description="share trained without instruction and picture")
    drop_image: float = Field(0.05, ge=0, description="share trained without the picture to edit")

    @model_validator(mode="after")
    def _fits(self) -> InstructPix2PixSettings:
        total = self.drop_text + self.drop_both + self.drop_image
        if total >= 1:
            raise UserError(
                f"drop_text, drop_both and drop_image are shares that add up to less than 1, got {total:g}",
                "invalid_config",
            )
        if self.guidance <= 1 < self.image_guidance:
            raise UserError(
                f"guidance {self.guidance:g} is none, so the picture cannot guide alone; set a guidance above 1, or "
                "image_guidance: 1",
                "invalid_config",
            )
        return self


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
    input_size: tuple[int, int] | None = Field(
        None,
        description="[short, long]: an image's shorter side gets `short` pixels, unless the longer one would get more "
        "than `long`; published weights have [800, 1333]. null: the trunk's input",
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
    def own_size(self) -> ShortSide | None:
        """The size of the images it looks at; None: the trunk's."""
        return None if self.input_size is None else ShortSide(*self.input_size)

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


_TWICE = "a layer's loss also trains the layer before it (DINO, arXiv 2203.03605, sec. 3.5)"


class DinoLossSettings(DinoSettings):
    """Matching, losses and denoising of a set of boxes."""

    class_cost: float = Field(2.0, ge=0, description="matching: share of the class")
    box_cost: float = Field(5.0, ge=0, description="matching: share of L1 between boxes")
    giou_cost: float = Field(2.0, ge=0, description="matching: share of GIoU")
    class_weight: float = Field(2.0, ge=0, description="loss: weight of the class")
    box_weight: float = Field(5.0, ge=0, description="loss: weight of L1 between boxes")
    giou_weight: float = Field(2.0, ge=0, description="loss: weight of GIoU")
    denoising_queries: int = Field(
        200, ge=0, description="noisy copies of the objects as queries of a training step; 0: none"
    )
    label_noise: float = Field(0.25, ge=0, le=1, description="share of the copies that get any prompt's link")
    box_noise: float = Field(1.0, ge=0, description="how far copies move, in units of half their size")
    pixels_at_once: int = Field(
        1 << 23,
        gt=0,
        description="how much of its requests a training step looks at together, in pixels of the images that they are "
        "about; more are looked at part by part, and activations computed again in the backward pass",
    )
    look_forward_twice: bool = Field(False, description=_TWICE)
    learned_class_scale: bool = Field(
        False,
        description="class logits get a learned scale and bias that start at 1/sqrt(hidden_size) and few objects; for "
        "training from scratch, published weights have none",
    )


class GroundingDinoSettings(DinoLossSettings):
    """The expert detector and segmenter (see `decoders/grounding_dino.py`)."""

    mask_channels: int = Field(256, gt=0, description="width of the mask features")
    mask_points: int = Field(12544, gt=3, description="points of a mask that a training step looks at")
    mask_weight: float = Field(5.0, ge=0, description="loss: weight of masks' cross entropy")
    dice_weight: float = Field(5.0, ge=0, description="loss: weight of masks' dice loss")


class UniPoseSettings(DinoLossSettings):
    """The expert of poses (see `decoders/unipose.py`; UniPose, arXiv 2310.08530)."""

    inverse_sigmoid_eps: float = Field(1e-3, gt=0, lt=0.5, description="how near to 0 and 1 a reference may come")
    box_layers: int = Field(2, gt=0, description="decoder layers that look for objects before their keypoints join")
    num_instances: int = Field(
        50, gt=0, description="the most instances of all prompts of a group whose keypoints are looked for"
    )
    size_tables: tuple[int, ...] = Field(
        (), description="lengths of tables of keypoint sizes by slot, which published weights have: [17, 51]"
    )
    keypoint_cost: float = Field(10.0, ge=0, description="matching: share of L1 between keypoints")
    oks_cost: float = Field(4.0, ge=0, description="matching: share of 1 - OKS")
    keypoint_weight: float = Field(10.0, ge=0, description="loss: weight of L1 between keypoints")
    oks_weight: float = Field(4.0, ge=0, description="loss: weight of 1 - OKS")
    visible_weight: float = Field(1.0, ge=0, description="loss: weight of the visibility's cross entropy")
    look_forward_twice: bool = Field(True, description=_TWICE)

    @model_validator(mode="after")
    def _check_layers(self) -> UniPoseSettings:
        if self.decoder_layers <= self.box_layers:
            raise UserError(
                f"decoder_layers {self.decoder_layers} must be more than box_layers {self.box_layers}: the layers "
                "after those look for keypoints",
                "invalid_config",
            )
        return self
