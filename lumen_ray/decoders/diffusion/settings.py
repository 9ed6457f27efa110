"""Settings of the image decoders. Keys of library configs are passed to the library's classes unchanged, so any size of
the same classes can be configured. Importing this module loads no model code."""

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
_PIPELINE_STEP = 8  # the pipelines of `diffusers` need sides that are multiples of it, whatever the VAE


@lru_cache
def _default(name: str, key: str) -> Any:
    """The default of a config key of a class of `diffusers`."""
    import diffusers

    return inspect.signature(getattr(diffusers, name).__init__).parameters[key].default


class DiffusionSettings(DecoderSettings):
    """Settings shared by the image decoders (see `decoders/diffusion/decoder.py`)."""

    image_size: int = Field(
        gt=0,
        description="side in pixels of a generated square image; training images and images to edit keep their aspect "
        "ratio with about as many pixels",
    )
    max_image_size: int = Field(1024, gt=0, description="maximum side in pixels of a requested image")
    unet: dict[str, Any] = Field(description="keys of diffusers.UNet2DConditionModel")
    vae: dict[str, Any] = Field(description="keys of diffusers.AutoencoderKL")
    text_encoder: dict[str, Any] | None = Field(
        None,
        description="keys of transformers.CLIPTextConfig: links are trained to match captions encoded by it, and its "
        "encoding of '' is the empty condition; null: the empty condition is learned",
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
        description="noise schedule: keys of diffusers' schedulers; each takes those it has",
    )
    sampler: Sampler = Field("DDIMScheduler", description="scheduler of diffusers for sampling")
    guidance: float = Field(7.5, ge=0, le=100, description="default classifier-free guidance scale of requests")
    num_tokens: int = Field(77, gt=0, description="tokens of a condition, the output of the link head")
    mapper_heads: int = Field(8, gt=0, description="attention heads of the link head's transformer")
    mapper_layers: int = Field(1, gt=0, description="layers of its encoder, and of its decoder")
    align_weight: float = Field(0.1, ge=0, description="weight of the MSE between links and encoded captions")
    train_unet: bool = Field(description="whether the UNet is trained, or only its condition")
    train_vae: bool = Field(False, description="whether the VAE is trained to reconstruct the target images")
    vae_weight: float = Field(1.0, gt=0, description="weight of the VAE's loss; the other losses do not train the VAE")
    vae_kl_weight: float = Field(1e-3, ge=0, description="weight of the KL per latent value")
    vae_images: int = Field(4, gt=0, description="images of a batch that train the VAE, the slowest part")

    @model_validator(mode="after")
    def _limit(self) -> DiffusionSettings:
        if self.max_image_size < self.image_size:
            raise UserError(
                f"max_image_size {self.max_image_size} must be at least image_size {self.image_size}", "invalid_config"
            )
        return self

    @property
    def step(self) -> int:
        """Height and width of an image must be multiples of this many pixels: UNet and VAE halve them repeatedly."""
        parts = (("AutoencoderKL", self.vae), ("UNet2DConditionModel", self.unet))
        blocks = [len(keys.get("block_out_channels") or _default(name, "block_out_channels")) for name, keys in parts]
        return math.lcm(2 ** (sum(blocks) - 2), _PIPELINE_STEP)

    @property
    def latent_scale(self) -> float:
        """Scale of the VAE's latents at the UNet's input."""
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
    """Text to image (see `decoders/diffusion/stable_diffusion.py`). VisionLLM v2 keeps the published UNet frozen."""

    train_unet: bool = Field(False, description="whether the UNet is trained, or only its condition")
    drop_text: float = Field(0.2, ge=0, lt=1, description="share of prompts trained with the empty condition")


class InstructPix2PixSettings(DiffusionSettings):
    """Edits (see `decoders/diffusion/instruct_pix2pix.py`). VisionLLM v2 fine-tunes the published UNet."""

    train_unet: bool = Field(True, description="whether the UNet is trained, or only its condition")
    image_guidance: float = Field(
        1.5, ge=1, le=100, description="default image guidance scale of requests: higher keeps more of the source image"
    )
    drop_text: float = Field(0.05, ge=0, description="share of edits trained without their instruction")
    drop_both: float = Field(0.05, ge=0, description="share trained without instruction and source image")
    drop_image: float = Field(0.05, ge=0, description="share trained without the source image")

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
                f"guidance {self.guidance:g} is off, and image_guidance needs it; set a guidance above 1, or "
                "image_guidance: 1",
                "invalid_config",
            )
        return self
