"""Edits by instruction: InstructPix2Pix (arXiv 2211.09800) with links as its text (VisionLLM v2, arXiv 2406.08394).

The UNet reads the latents of the source image beside the noisy ones (sec. 3.2 of InstructPix2Pix): the mode of the
VAE's posterior, unscaled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lumen_ray.decoders.base import SampleSettings
from lumen_ray.decoders.diffusion import INSTRUCT_PIX2PIX
from lumen_ray.decoders.diffusion.decoder import DiffusionDecoder
from lumen_ray.decoders.diffusion.modules import fit_pixels
from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings
from lumen_ray.errors import UserError
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Pixels


class InstructPix2PixDecoder(DiffusionDecoder):
    """See the module's docstring."""

    spec = INSTRUCT_PIX2PIX
    latents_read = 2
    guides = ("guidance", "image_guidance")
    settings: InstructPix2PixSettings

    def _training_condition(self, link: SuperLink, view: Pixels | None, size: Size) -> tuple[Tensor, list[Tensor]]:
        """Drops the text, both, or the source image, by one random number per prompt (InstructPix2Pix, sec. 3.2.1)."""
        s, draw = self.settings, torch.rand(len(link), device=link.embeddings.device)
        text, both = s.drop_text, s.drop_text + s.drop_both
        pixels = 2 * self._source(link, view, size) - 1
        with torch.no_grad():
            source = self.vae.encode(pixels).latent_dist.mode()
        dropped = (draw >= text) & (draw < both + s.drop_image)
        source = source.masked_fill(dropped[:, None, None, None], 0)
        return self._replaced(link.embeddings, draw < both), [source]

    @staticmethod
    def _source(link: SuperLink, view: Pixels | None, size: Size) -> Tensor:
        """float32 [G, 3, *size] in 0..1: each prompt's source image, without padding."""
        assert view is not None, "the decoder reads pixels"
        return fit_pixels(view.images[link.image_index], view.extents[link.image_index], size)

    @staticmethod
    def _pipeline_class() -> Any:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        return StableDiffusionInstructPix2PixPipeline

    def _inputs(self, link: SuperLink, view: Pixels | None, size: Size, settings: SampleSettings) -> dict[str, Any]:
        return {"image": self._source(link, view, size), "image_guidance_scale": settings.image_guidance}

    def _checked(self, settings: SampleSettings) -> Size:
        """As in the base; also both scales, since the pipeline drops all guidance if one of them is off."""
        image, text = settings.image_guidance, settings.guidance
        assert image is not None and text is not None, "set by _with_defaults"
        if not math.isfinite(image) or image < 1:
            raise UserError(f"image_guidance must be at least 1, got {image}", "invalid_sampling")
        if text <= 1 < image:
            raise UserError(
                f"guidance {text} is off, and image_guidance needs it; give a guidance above 1, or an "
                "image_guidance of 1",
                "invalid_sampling",
            )
        return super()._checked(settings)
