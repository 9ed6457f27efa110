"""The library modules of an image decoder: built from checked settings, and their inputs prepared."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen_ray.decoders.diffusion.schedulers import config_keys
from lumen_ray.errors import UserError, suggest
from lumen_ray.meta_init import published_part
from lumen_ray.structures import Size

if TYPE_CHECKING:
    from transformers import CLIPTextConfig


def check_keys(where: str, keys: Collection[str], valid: Collection[str], owner: str) -> None:
    """Raises `UserError` for a key that `owner` lacks; library classes ignore some unknown keys silently."""
    for key in keys:
        if key not in valid:
            raise UserError(
                f"unknown key '{where}.{key}';{suggest(key, valid)} valid keys are those of {owner}", "invalid_config"
            )


def build_module(cls: Any, where: str, keys: dict[str, Any]) -> Any:
    """Builds a model class of `diffusers` with fresh weights. Raises `UserError` for invalid keys."""
    check_keys(where, keys, config_keys(cls), f"diffusers.{cls.__name__}")
    try:
        return published_part(lambda: cls(**keys))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}", "invalid_config") from None


def empty_caption_ids(config: CLIPTextConfig) -> Tensor:
    """int64 [1, L]: the ids of the empty text from CLIP's tokenizer, padded with the end token."""
    begin, end = config.bos_token_id, config.eos_token_id
    if end == 2:  # wrong in published configs: the tokenizer uses the vocabulary's last two ids
        begin, end = config.vocab_size - 2, config.vocab_size - 1
    return torch.tensor([[begin, *[end] * (config.max_position_embeddings - 1)]])


def fit_pixels(images: Tensor, extents: Tensor | None, size: Size) -> Tensor:
    """Crops images uint8 [N, 3, H, W] to `extents` (int64 [N, 2] (height, width); None: full size) and resizes them
    with antialiasing -> float32 [N, 3, *size] in 0..1. An image's result does not depend on the others."""
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
def without_warnings() -> Iterator[None]:
    """Context in which `transformers` logs only errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
