"""Text to image: Stable Diffusion (arXiv 2112.10752) with links as its text (VisionLLM v2, arXiv 2406.08394)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumen_ray.decoders.base import SampleSettings
from lumen_ray.decoders.diffusion import STABLE_DIFFUSION
from lumen_ray.decoders.diffusion.decoder import DiffusionDecoder
from lumen_ray.decoders.diffusion.settings import StableDiffusionSettings
from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Pixels


class StableDiffusionDecoder(DiffusionDecoder):
    """See the module's docstring."""

    spec = STABLE_DIFFUSION
    latents_read = 1
    settings: StableDiffusionSettings

    def _training_condition(self, link: SuperLink, view: Pixels | None, size: Size) -> tuple[Tensor, list[Tensor]]:
        """Drops the text of a random share of the prompts."""
        dropped = torch.rand(len(link), device=link.embeddings.device) < self.settings.drop_text
        return self._replaced(link.embeddings, dropped), []

    @staticmethod
    def _pipeline_class() -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    def _inputs(self, link: SuperLink, view: Pixels | None, size: Size, settings: SampleSettings) -> dict[str, Any]:
        return {"height": size[0], "width": size[1]}
