"""Settings of the expert decoders. Keys of library configs are passed to the library's classes unchanged, so any size
of the same classes can be described; they are checked where the decoder is built."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError

Sampler = Literal[
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
]
SAMPLERS: tuple[str, ...] = get_args(Sampler)


class DiffusionSettings(Settings):
    """What the decoders that make pictures share (see `decoders/diffusion.py`)."""

    image_size: int = Field(gt=0, description="side in pixels of the pictures it is trained on, and of a default one")
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
        },
        description="the noise schedule: keys of diffusers' schedulers; each takes those it has",
    )
    sampler: Sampler = Field("DDIMScheduler", description="scheduler of diffusers that pictures are drawn with")
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


class StableDiffusionSettings(DiffusionSettings):
    """Text to image (see `decoders/stable_diffusion.py`). VisionLLM v2 keeps the published UNet as it is."""

    train_unet: bool = Field(False, description="whether the UNet learns, or only what conditions it")
    drop_text: float = Field(0.2, ge=0, lt=1, description="share of prompts trained with the empty condition")


class InstructPix2PixSettings(DiffusionSettings):
    """Edits (see `decoders/instruct_pix2pix.py`). VisionLLM v2 goes on training the published UNet."""

    train_unet: bool = Field(True, description="whether the UNet learns, or only what conditions it")
    drop_text: float = Field(0.05, ge=0, description="share of edits trained without their instruction")
    drop_both: float = Field(0.05, ge=0, description="share trained without instruction and picture")
    drop_image: float = Field(0.05, ge=0, description="share trained without the picture to edit")

    @model_validator(mode="after")
    def _shares(self) -> InstructPix2PixSettings:
        total = self.drop_text + self.drop_both + self.drop_image
        if total >= 1:
            raise UserError(
                f"drop_text, drop_both and drop_image are shares that add up to less than 1, got {total:g}",
                "invalid_config",
            )
        return self
