"""Edits by instruction: InstructPix2Pix (arXiv 2211.09800) with links as its text (VisionLLM v2, arXiv 2406.08394).

The UNet reads the latents of the picture to edit beside the noisy ones: the mode of the VAE's posterior, not scaled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen_ray.decoders.base import SampleSettings
from lumen_ray.decoders.diffusion import INSTRUCT_PIX2PIX
from lumen_ray.decoders.diffusion.decoder import DiffusionDecoder, fit_pixels
from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings
from lumen_ray.errors import UserError
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Pixels

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline


class InstructPix2PixDecoder(DiffusionDecoder):
    spec = INSTRUCT_PIX2PIX
    latents_read = 2
    guides = ("guidance", "image_guidance")
    settings: InstructPix2PixSettings

    def _training_condition(self, link: SuperLink, view: Pixels, size: Size) -> tuple[Tensor, list[Tensor]]:
        """One draw per prompt decides (sec. 3.2.1 of InstructPix2Pix): first the text alone is dropped, then both, then
        the picture alone."""
        s, draw = self.settings, torch.rand(len(link), device=link.embeddings.device)
        text, both = s.drop_text, s.drop_text + s.drop_both
        pixels = 2 * self._source(link, view, size) - 1
        with torch.no_grad():
            source = self.vae.encode(pixels).latent_dist.mode()
        unseen = (draw >= text) & (draw < both + s.drop_image)
        source = source.masked_fill(unseen[:, None, None, None], 0)
        return self._replaced(link.embeddings, draw < both), [source]

    @staticmethod
    def _source(link: SuperLink, view: Pixels, size: Size) -> Tensor:
        """float32 [G, 3, *size] in 0..1: the picture each prompt is to edit, without the input's padding."""
        return fit_pixels(view.images[link.image_index], view.extents[link.image_index], size)

    @staticmethod
    def _pipeline_class() -> type[StableDiffusionInstructPix2PixPipeline]:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        return StableDiffusionInstructPix2PixPipeline

    def _inputs(self, link: SuperLink, view: Pixels, size: Size, settings: SampleSettings) -> dict[str, Any]:
        return {"image": self._source(link, view, size), "image_guidance_scale": settings.image_guidance}

    def _checked(self, settings: SampleSettings) -> Size:
        """The pipeline would leave out all guidance where one of the two scales allows none."""
        image, text = settings.image_guidance, settings.guidance
        if not math.isfinite(image) or image < 1:
            raise UserError(f"image_guidance must be at least 1, got {image}", "invalid_sampling")
        if text <= 1 < image:
            raise UserError(
                f"guidance {text} is none, so the picture cannot guide alone; give a guidance above 1, or an "
                "image_guidance of 1",
                "invalid_sampling",
            )
        return super()._checked(settings)
