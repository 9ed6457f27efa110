"""Base of Stable Diffusion and InstructPix2Pix: UNet, VAE, text encoder, noise, losses and sampling (latent diffusion,
arXiv 2112.10752, sec. 3).

The models are those of `diffusers` and `transformers`; the UNet is conditioned on the link instead of a text (VisionLLM
v2, arXiv 2406.08394, sec. 3.3). The libraries take seconds to import, so they are imported when a decoder is built.

Legend: G prompts, T tokens of a condition, C its width, z latent channels, h x w latent places.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lumen_ray.cancellation import between_passes
from lumen_ray.decoders.base import ImageDecoder, LossTerm, SampleSettings, sum_terms
from lumen_ray.decoders.diffusion.modules import (
    build_module,
    check_keys,
    empty_caption_ids,
    fit_pixels,
    without_warnings,
)
from lumen_ray.decoders.diffusion.schedule import check_schedule, check_steps, scheduler_keys
from lumen_ray.decoders.diffusion.schedulers import TRAINING, Scheduler, make_scheduler
from lumen_ray.decoders.diffusion.settings import DiffusionSettings
from lumen_ray.decoders.spec import TrunkShape
from lumen_ray.errors import UserError
from lumen_ray.input_size import by_size
from lumen_ray.meta_init import published_part
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, Pixels


class DiffusionDecoder(ImageDecoder):
    """A latent diffusion model. Subclasses define the UNet's extra inputs and the sampling pipeline.

    `loss_names`: noise prediction, alignment with captions, VAE.
    """

    settings: DiffusionSettings
    unet: Any  # a diffusers.UNet2DConditionModel
    vae: Any  # a diffusers.AutoencoderKL
    text_encoder: Any  # a transformers.CLIPTextModel, or None
    null: nn.Parameter | None  # [T, C], the learned empty condition if there is no text encoder
    latents_read: ClassVar[int]  # number of latents stacked on the UNet's input channels
    guides: ClassVar[tuple[str, ...]] = ("guidance",)  # guidance scales of the sample settings that its pipeline takes
    #: latents go through every step of a sampler, which takes the dtype of the UNet's first layer; bf16 has no more
    #: than an image's 8 bits of precision, and the VAE runs only once
    exact = ("vae", "unet.conv_in", "unet.conv_out")

    @classmethod
    def build(cls, settings: DiffusionSettings, shape: TrunkShape) -> Self:
        return cls(settings)

    def __init__(self, settings: DiffusionSettings):
        super().__init__()
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.settings = settings
        check_keys(f"{self.name}.scheduler", settings.scheduler, scheduler_keys(), "diffusers' schedulers")
        self.unet = build_module(UNet2DConditionModel, f"{self.name}.unet", settings.unet)
        self.vae = build_module(AutoencoderKL, f"{self.name}.vae", settings.vae)
        self.text_encoder = self.null = None
        if settings.text_encoder is not None:
            self.text_encoder = self._build_text_encoder(settings.text_encoder)
        else:
            self.null = nn.Parameter(torch.randn(settings.num_tokens, self.width))
        self._check()
        self.requires_grad_()

    def _build_text_encoder(self, keys: dict[str, Any]) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        valid = {f.name for f in dataclasses.fields(CLIPTextConfig)}
        check_keys(f"{self.name}.text_encoder", keys, valid, "transformers.CLIPTextConfig")
        return published_part(lambda: CLIPTextModel(CLIPTextConfig(**keys)))

    def _check(self) -> None:
        """Raises `UserError` if UNet, VAE and text encoder do not fit together."""
        s, wanted = self.settings, self.latents_read * self.vae.config.latent_channels
        text = None if self.text_encoder is None else self.text_encoder.config
        rules = [
            (self.unet.config.in_channels == wanted, f"unet.in_channels must be {wanted}, with this VAE"),
            (
                self.unet.config.out_channels == self.vae.config.latent_channels,
                f"unet.out_channels must be vae.latent_channels, {self.vae.config.latent_channels}",
            ),
            (s.image_size % self.step == 0, f"image_size must be a multiple of {self.step}, with this UNet and VAE"),
            (self.width % s.mapper_heads == 0, f"mapper_heads must divide unet.cross_attention_dim, {self.width}"),
            (
                text is None or text.hidden_size == self.width,
                f"text_encoder.hidden_size must be unet.cross_attention_dim, {self.width}",
            ),
            (
                text is None or text.max_position_embeddings == s.num_tokens,
                f"text_encoder.max_position_embeddings must be num_tokens, {s.num_tokens}",
            ),
        ]
        for holds, message in rules:
            if not holds:
                raise UserError(f"{self.name}.{message}", "invalid_config")
        check_schedule(self.name, s)

    @property
    def width(self) -> int:
        """C, the width of the UNet's cross-attention input."""
        return self.unet.config.cross_attention_dim

    @property
    def step(self) -> int:
        """Height and width of an image must be multiples of this many pixels."""
        return self.settings.step

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in `nn.Module`, but modules that the settings do not train stay frozen."""
        super().requires_grad_(requires_grad)
        trained = ((self.unet, self.settings.train_unet), (self.vae, self.settings.train_vae))
        for module, is_trained in (*trained, (self.text_encoder, False)):
            if module is not None and not is_trained:
                module.requires_grad_(False)
        return self

    def _scheduler(self, name: str) -> Scheduler:
        return make_scheduler(name, self.settings.scheduler)

    def empty_condition(self) -> Tensor:
        """The condition of an empty prompt, [1, T, C]: the encoded empty text, or a learned parameter."""
        if self.text_encoder is None:
            assert self.null is not None, "a decoder without a text encoder has it"
            return self.null[None]
        with torch.no_grad():
            ids = empty_caption_ids(self.text_encoder.config).to(self.text_encoder.device)
            return self.text_encoder(ids).last_hidden_state

    # Training

    def losses(self, link: SuperLink, view: Pixels | None, targets: ImageTargets) -> dict[str, LossTerm]:
        """Noise MSE per prompt; MSE to the encoded captions per prompt; the VAE's loss per image that trains it.

        Only its own loss trains the VAE. Images are processed in their given size (`settings.input_rule`), batched by
        size: the UNet has no attention mask, so there must be no padding.
        """
        noise_name, align_name, vae_name = self.loss_names
        zero = link.embeddings.new_zeros(())
        losses = {noise_name: LossTerm(zero, zero)}
        if self.text_encoder is not None:
            losses[align_name] = LossTerm(zero, zero)
        train_vae = any(p.requires_grad for p in self.vae.parameters())
        if train_vae:
            losses[vae_name] = LossTerm(zero, zero)
        if not len(link):
            return losses
        chosen = link.parent.new_empty(0)  # images that train the VAE
        if train_vae:
            chosen = torch.randperm(len(link))[: self.settings.vae_images].to(link.parent)
        each = torch.zeros(len(link), device=zero.device)
        noise: list[LossTerm] = []
        vae: list[LossTerm] = []
        extents = targets.extents.tolist() if targets.extents is not None else [targets.images.shape[-2:]] * len(link)
        for size, numbers in sorted(by_size([(h, w) for h, w in extents]).items()):
            members = torch.tensor(numbers, device=targets.images.device)
            part = targets.select(members)
            pixels = 2 * fit_pixels(part.images, part.extents, size) - 1
            if train_vae and len(trained := chosen[torch.isin(chosen, members)]):
                vae.append(self._vae_loss(pixels[torch.searchsorted(members, trained)]))
            term = self._noise_loss(link.select(members), view, pixels)
            assert term.each is not None, "set by _noise_loss"
            each[members] = term.each
            noise.append(term)
        losses[noise_name] = sum_terms(noise, each)
        if train_vae:
            losses[vae_name] = sum_terms(vae)
        if self.text_encoder is not None and targets.caption_ids is not None:
            losses[align_name] = self._align_loss(link.embeddings, targets.caption_ids)
        return losses

    def _noise_loss(self, link: SuperLink, view: Pixels | None, pixels: Tensor) -> LossTerm:
        """MSE of the UNet's prediction at a random time step (DDPM, arXiv 2006.11239, eq. 14), with `each` per prompt.
        `pixels` float32 [G, 3, H, W] in -1..1."""
        scheduler = self._scheduler(TRAINING)
        with torch.no_grad():
            latents = self.vae.encode(pixels).latent_dist.sample().float() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        condition, beside = self._training_condition(link, view, (pixels.shape[-2], pixels.shape[-1]))
        noisy = torch.cat([scheduler.add_noise(latents, noise, times), *beside], dim=1)
        predicted = self.unet(noisy, times, encoder_hidden_states=condition).sample
        target = self._unet_target(scheduler, latents, noise, times)
        error = (predicted.float() - target.float()).square().flatten(1).mean(1)
        return LossTerm(error.sum(), error.new_tensor(float(len(error))), error.detach())

    @staticmethod
    def _unet_target(scheduler: Scheduler, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The target of the UNet by the schedule's `prediction_type`. All in fp32: schedulers compute in the dtype of
        their input, and in bf16 the first steps would add no noise."""
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":
            return scheduler.get_velocity(latents, noise, times)
        return {"sample": latents, "epsilon": noise}[kind]

    def _training_condition(self, link: SuperLink, view: Pixels | None, size: Size) -> tuple[Tensor, list[Tensor]]:
        """For images of (height, width) `size`: the condition [G, T, C], randomly dropped for classifier-free guidance
        (arXiv 2207.12598), and the UNet's extra latents, [G, z, h, w] each."""
        raise NotImplementedError

    def _replaced(self, embeddings: Tensor, dropped: Tensor) -> Tensor:
        """Embeddings [G, T, C], replaced by the empty condition where `dropped` (bool [G])."""
        return torch.where(dropped[:, None, None], self.empty_condition().to(embeddings.dtype), embeddings)

    def _align_loss(self, embeddings: Tensor, ids: Tensor) -> LossTerm:
        """MSE to the last hidden state of the CLIP text encoder, also for prompts whose condition is dropped."""
        with torch.no_grad():
            encoded = self.text_encoder(ids).last_hidden_state
        error = (embeddings.float() - encoded.float()).square().flatten(1).mean(1)
        return LossTerm(self.settings.align_weight * error.sum(), error.new_tensor(float(len(error))))

    def _vae_loss(self, pixels: Tensor) -> LossTerm:
        """Reconstruction MSE plus KL to a standard normal (VAE, arXiv 1312.6114, eq. 10), as means over the values of
        an image and of its latents.

        No L1: its gradient does not depend on the size of the error, so hues would be learned last.
        """
        posterior = self.vae.encode(pixels).latent_dist
        error = (self.vae.decode(posterior.sample()).sample - pixels).float()
        values = posterior.mean[0].numel()
        each = error.square().flatten(1).mean(1) + self.settings.vae_kl_weight * posterior.kl() / values
        return LossTerm(self.settings.vae_weight * each.sum(), each.new_tensor(float(len(each))))

    # Sampling

    @torch.no_grad()
    def sample(self, link: SuperLink, view: Pixels | None, settings: SampleSettings) -> Tensor:
        """Generates images uint8 [G * num_images, 3, height, width], prompt by prompt, with the pipeline of
        `diffusers`.

        Image n of every prompt starts from the noise of seed + n. Raises `UserError` for invalid settings.
        """
        settings = self._with_defaults(settings)
        size = self._checked(settings)
        order = [(p, n) for p in range(len(link)) for n in range(settings.num_images)]
        pictures = [torch.empty(0, 3, *size, dtype=torch.uint8)]
        self.vae.enable_slicing()
        try:
            for first in range(0, len(order), settings.batch_size):
                members, numbers = zip(*order[first : first + settings.batch_size], strict=True)
                # one CPU generator per image: the noise depends on neither the batch nor the device
                generators = [torch.Generator().manual_seed(settings.seed + n) for n in numbers]
                rows = torch.tensor(members, device=link.embeddings.device)
                part = SuperLink(link.decoder, link.embeddings[rows], link.image_index[rows], link.parent[rows])
                drawn = self._draw(part, view, size, settings, generators)
                pictures.append((drawn * 255).round().to(torch.uint8).cpu())
        finally:
            self.vae.disable_slicing()
        return torch.cat(pictures)

    def _draw(
        self,
        link: SuperLink,
        view: Pixels | None,
        size: Size,
        settings: SampleSettings,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Images float [G, 3, *size] in 0..1, one per prompt of the link."""
        pipeline = self._pipeline()
        pipeline.set_progress_bar_config(disable=True)
        condition = link.embeddings.to(self.unet.dtype)
        return pipeline(
            prompt_embeds=condition,
            negative_prompt_embeds=self.empty_condition().to(condition).expand_as(condition),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type="pt",
            callback_on_step_end=_between_steps,
            **self._inputs(link, view, size, settings),
        ).images.float()

    def _pipeline(self) -> Any:
        """A pipeline of `diffusers` around this decoder's modules."""
        with without_warnings():  # about image processors that need torchvision, none of which is used
            pipeline = self._pipeline_class()
        return pipeline(
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            unet=self.unet,
            scheduler=self._scheduler(self.settings.sampler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @staticmethod
    def _pipeline_class() -> Any:
        """The pipeline's class, imported when needed."""
        raise NotImplementedError

    def _inputs(self, link: SuperLink, view: Pixels | None, size: Size, settings: SampleSettings) -> dict[str, Any]:
        """Arguments of this decoder's pipeline that other pipelines lack."""
        raise NotImplementedError

    def _with_defaults(self, settings: SampleSettings) -> SampleSettings:
        """Fills unset guidance scales from the decoder's settings."""
        defaults = {name: getattr(self.settings, name) for name in self.guides if getattr(settings, name) is None}
        return dataclasses.replace(settings, **defaults)

    def _checked(self, settings: SampleSettings) -> Size:
        """The image size (height, width) of valid settings. Raises `UserError` for invalid ones."""
        assert settings.guidance is not None, "set by _with_defaults"
        size = settings.size or (self.settings.image_size,) * 2
        self.settings.input_rule.check(size)
        rules = [
            (math.isfinite(settings.guidance), f"guidance must be a finite number, got {settings.guidance}"),
            (settings.num_images >= 1, f"num_images must be at least 1, got {settings.num_images}"),
            (settings.batch_size >= 1, f"batch_size must be at least 1, got {settings.batch_size}"),
            (settings.seed >= 0, f"the seed must not be negative, got {settings.seed}"),
        ]
        for holds, message in rules:
            if not holds:
                raise UserError(message, "invalid_sampling")
        check_steps(self.name, self.settings, settings.steps)
        return size


def _between_steps(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    between_passes()
    pipeline.vae.enable_slicing()  # another thread may have ended its sampling meanwhile
    return tensors
