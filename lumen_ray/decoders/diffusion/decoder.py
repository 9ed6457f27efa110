"""What Stable Diffusion and InstructPix2Pix share: UNet, VAE, text encoder, noise, losses and sampling.

The classes are those of `diffusers` and `transformers`; what conditions the UNet is the link instead of a text
(VisionLLM v2, arXiv 2406.08394, sec. 3.3). They take seconds to import, so that happens where a decoder is built.

Legend: G prompts, T tokens of a condition, C its width, z latent channels, h x w latent places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.base import ImageDecoder, LossTerm, SampleSettings
from lumen_ray.decoders.diffusion.schedule import check_schedule, check_steps, scheduler_keys
from lumen_ray.decoders.diffusion.schedulers import TRAINING, config_keys, make_scheduler
from lumen_ray.decoders.diffusion.settings import DiffusionSettings
from lumen_ray.decoders.spec import TrunkShape
from lumen_ray.errors import UserError, suggest
from lumen_ray.input_size import by_size
from lumen_ray.meta_init import published_part
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, Pixels

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
    from transformers import CLIPTextConfig


def check_keys(where: str, keys: Collection[str], valid: Collection[str], owner: str) -> None:
    """`UserError` for a key that `owner` does not know; library classes would pass over some of them in silence."""
    for key in keys:
        if key not in valid:
            raise UserError(
                f"unknown key '{where}.{key}';{suggest(key, valid)} valid keys are those of {owner}", "invalid_config"
            )


def _build(cls: type[nn.Module], where: str, keys: dict[str, Any]) -> nn.Module:
    """A model of `diffusers` with fresh weights; `UserError` for keys that make none."""
    check_keys(where, keys, config_keys(cls), f"diffusers.{cls.__name__}")
    try:
        return published_part(lambda: cls(**keys))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}", "invalid_config") from None


def empty_caption_ids(config: CLIPTextConfig) -> Tensor:
    """int64 [1, L]: what CLIP's tokenizer makes of the empty text, padded with the end token."""
    begin, end = config.bos_token_id, config.eos_token_id
    if end == 2:  # published configs say so; their tokenizer's are the vocabulary's last two
        begin, end = config.vocab_size - 2, config.vocab_size - 1
    return torch.tensor([[begin, *[end] * (config.max_position_embeddings - 1)]])


def fit_pixels(images: Tensor, extents: Tensor | None, size: Size) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, *size] in 0..1: the part within `extents` (int64 [N, 2] (height, width);
    None: all), resized with an antialiasing filter. An image's result does not depend on the others."""
    if extents is None:
        extents = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
    out = torch.empty(len(images), 3, *size, device=images.device)
    for extent in extents.unique(dim=0):
        members = torch.nonzero((extents == extent).all(1)).flatten()
        height, width = extent.tolist()
        part = images[members, :, :height, :width].float() / 255
        out[members] = F.interpolate(part, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return out


@contextmanager
def _without_warnings() -> Iterator[None]:
    """`transformers` logs errors alone."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _summed(terms: list[LossTerm]) -> LossTerm:
    return LossTerm(sum(term.total for term in terms), sum(term.count for term in terms))


class DiffusionDecoder(ImageDecoder):
    """A latent diffusion model. Subclasses say what its UNet reads beside the noisy latents, and how it is sampled.

    `loss_names`: of the noise, of the alignment, of the VAE.
    """

    latents_read: ClassVar[int]  # stacked on the UNet's input channels
    guides: ClassVar[tuple[str, ...]] = ("guidance",)  # of the sample settings, those its pipeline takes
    #: latents go through every step of a sampler, which takes the precision of the UNet's first layer for theirs; a
    #: picture's 8 bits are all that bf16 has, and its VAE runs once
    exact = ("vae", "unet.conv_in", "unet.conv_out")

    @classmethod
    def build(cls, settings: DiffusionSettings, shape: TrunkShape) -> Self:
        return cls(settings)

    def __init__(self, settings: DiffusionSettings):
        super().__init__()
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.settings = settings
        check_keys(f"{self.name}.scheduler", settings.scheduler, scheduler_keys(), "diffusers' schedulers")
        self.unet = _build(UNet2DConditionModel, f"{self.name}.unet", settings.unet)
        self.vae = _build(AutoencoderKL, f"{self.name}.vae", settings.vae)
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
        """The parts must fit together."""
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
        """C, of the cross attention."""
        return self.unet.config.cross_attention_dim

    @property
    def step(self) -> int:
        """What height and width of a picture are multiples of."""
        return self.settings.step

    def requires_grad_(self, requires_grad: bool = True) -> DiffusionDecoder:
        """What the settings do not train stays frozen, whatever a stage of a recipe asks for."""
        super().requires_grad_(requires_grad)
        trained = ((self.unet, self.settings.train_unet), (self.vae, self.settings.train_vae))
        for module, learns in (*trained, (self.text_encoder, False)):
            if module is not None and not learns:
                module.requires_grad_(False)
        return self

    def _scheduler(self, name: str) -> SchedulerMixin:
        return make_scheduler(name, self.settings.scheduler)

    def empty_condition(self) -> Tensor:
        """[1, T, C]: what stands for "no prompt": the encoded empty text, or what was learned for it."""
        if self.text_encoder is None:
            return self.null[None]
        with torch.no_grad():
            ids = empty_caption_ids(self.text_encoder.config).to(self.text_encoder.device)
            return self.text_encoder(ids).last_hidden_state

    # Training

    def losses(self, link: SuperLink, view: Pixels | None, targets: ImageTargets) -> dict[str, LossTerm]:
        """Noise MSE per prompt; MSE to the encoded captions per prompt; the VAE's loss per picture it learns from.

        Only its own loss reaches the VAE. Pictures are learned in the size they come in (`settings.input_rule`), those
        of one size together: as the UNet has no mask, no padding may be among them.
        """
        noise_name, align_name, vae_name = self.loss_names
        zero = link.embeddings.new_zeros(())
        losses = {noise_name: LossTerm(zero, zero)}
        if self.text_encoder is not None:
            losses[align_name] = LossTerm(zero, zero)
        learns_vae = any(p.requires_grad for p in self.vae.parameters())
        if learns_vae:
            losses[vae_name] = LossTerm(zero, zero)
        if not len(link):
            return losses
        chosen = torch.randperm(len(link))[: self.settings.vae_images].to(link.parent) if learns_vae else None
        each, noise, vae = torch.zeros(len(link), device=zero.device), [], []
        extents = targets.extents.tolist() if targets.extents is not None else [targets.images.shape[-2:]] * len(link)
        for size, numbers in sorted(by_size([(h, w) for h, w in extents]).items()):
            members = torch.tensor(numbers, device=targets.images.device)
            part = targets.select(members)
            pixels = 2 * fit_pixels(part.images, part.extents, size) - 1
            if learns_vae and len(own := chosen[torch.isin(chosen, members)]):
                vae.append(self._vae_loss(pixels[torch.searchsorted(members, own)]))
            noise.append(self._noise_loss(link.select(members), view, pixels))
            each[members] = noise[-1].each
        losses[noise_name] = _summed(noise)._replace(each=each)
        if learns_vae:
            losses[vae_name] = _summed(vae)
        if self.text_encoder is not None and targets.caption_ids is not None:
            losses[align_name] = self._align_loss(link.embeddings, targets.caption_ids)
        return losses

    def _noise_loss(self, link: SuperLink, view: Pixels | None, pixels: Tensor) -> LossTerm:
        scheduler = self._scheduler(TRAINING)
        with torch.no_grad():
            latents = self.vae.encode(pixels).latent_dist.sample().float() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        condition, beside = self._training_condition(link, view, tuple(pixels.shape[-2:]))
        noisy = torch.cat([scheduler.add_noise(latents, noise, times), *beside], dim=1)
        predicted = self.unet(noisy, times, encoder_hidden_states=condition).sample
        wanted = self._wanted(scheduler, latents, noise, times)
        error = (predicted.float() - wanted.float()).square().flatten(1).mean(1)
        return LossTerm(error.sum(), error.new_tensor(float(len(error))), error.detach())

    @staticmethod
    def _wanted(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the UNet predicts, by the schedule's `prediction_type`; all in fp32, as schedulers take their precision
        from what they are given, and in bf16 the first steps would add no noise at all."""
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":
            return scheduler.get_velocity(latents, noise, times)
        return {"sample": latents, "epsilon": noise}[kind]

    def _training_condition(self, link: SuperLink, view: Pixels | None, size: Size) -> tuple[Tensor, list[Tensor]]:
        """For pictures of (height, width) `size`: the condition [G, T, C] with some of it dropped, for classifier-free
        guidance, and the latents that the UNet reads beside the noisy ones, [G, z, h, w] each."""
        raise NotImplementedError

    def _replaced(self, embeddings: Tensor, dropped: Tensor) -> Tensor:
        """[G, T, C] with the empty condition where `dropped` (bool [G])."""
        return torch.where(dropped[:, None, None], self.empty_condition().to(embeddings.dtype), embeddings)

    def _align_loss(self, embeddings: Tensor, ids: Tensor) -> LossTerm:
        """MSE to the last hidden state of the CLIP text encoder; dropped conditions take part as they were."""
        with torch.no_grad():
            said = self.text_encoder(ids).last_hidden_state
        error = (embeddings.float() - said.float()).square().flatten(1).mean(1)
        return LossTerm(self.settings.align_weight * error.sum(), error.new_tensor(float(len(error))))

    def _vae_loss(self, pixels: Tensor) -> LossTerm:
        """Reconstruction and KL to a standard normal, each a mean per value of a picture or its latents.

        MSE alone: beside an L1, whose gradient is the same for any error, hues are learned last.
        """
        posterior = self.vae.encode(pixels).latent_dist
        error = (self.vae.decode(posterior.sample()).sample - pixels).float()
        values = posterior.mean[0].numel()
        each = error.square().flatten(1).mean(1) + self.settings.vae_kl_weight * posterior.kl() / values
        return LossTerm(self.settings.vae_weight * each.sum(), each.new_tensor(float(len(each))))

    # Sampling

    @torch.no_grad()
    def sample(self, link: SuperLink, view: Pixels | None, settings: SampleSettings) -> Tensor:
        """uint8 [G * num_images, 3, height, width], prompt by prompt, drawn by the pipeline of `diffusers`.

        Picture n of every prompt starts from the noise of seed + n. Raises `UserError` for settings that cannot work.
        """
        settings = self._with_own(settings)
        size = self._checked(settings)
        order = [(p, n) for p in range(len(link)) for n in range(settings.num_images)]
        pictures = [torch.empty(0, 3, *size, dtype=torch.uint8)]
        self.vae.enable_slicing()
        try:
            for first in range(0, len(order), settings.batch_size):
                members, numbers = zip(*order[first : first + settings.batch_size], strict=True)
                # a generator of its own on the CPU: the noise depends on neither the batch nor the device
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
        """float [G, 3, *size] in 0..1, one picture for every entry of the link."""
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
            **self._inputs(link, view, size, settings),
        ).images.float()

    def _pipeline(self) -> DiffusionPipeline:
        """The pipeline around this decoder's own modules."""
        with _without_warnings():  # of processors that it has none of, which would like to have torchvision
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
    def _pipeline_class() -> type[DiffusionPipeline]:
        raise NotImplementedError

    def _inputs(self, link: SuperLink, view: Pixels | None, size: Size, settings: SampleSettings) -> dict[str, Any]:
        """Arguments of the pipeline that not all have."""
        raise NotImplementedError

    def _with_own(self, settings: SampleSettings) -> SampleSettings:
        """With the decoder's own guidance where none is asked for."""
        own = {name: getattr(self.settings, name) for name in self.guides if getattr(settings, name) is None}
        return dataclasses.replace(settings, **own)

    def _checked(self, settings: SampleSettings) -> Size:
        """The size to draw, of settings that can work; else a `UserError`."""
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
