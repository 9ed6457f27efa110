"""Settings of the expert decoders. Keys of library configs are passed to the library's classes unchanged, so any size
of the same classes can be described. Importing this module loads no model code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from lumen_ray.decoders.spec import DecoderSettings
from lumen_ray.errors import UserError
from lumen_ray.input_size import PictureSize

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


class DiffusionSettings(DecoderSettings):
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
    def input_rule(self) -> PictureSize:
        return PictureSize(self.image_size, self.max_image_size, self.step)

    @property
    def caption_encoder(self) -> Mapping[str, Any] | None:
        return self.text_encoder

    def weight_semantics(self) -> dict[str, Any]:
        from lumen_ray.decoders.diffusion.schedulers import learned_schedule

        keys = {"mapper_heads": self.mapper_heads, "latent_scale": self.latent_scale}
        return keys | {"scheduler": learned_schedule(self.scheduler)}


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
