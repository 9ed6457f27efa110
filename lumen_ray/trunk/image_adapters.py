"""Low-rank adapters of the LLM (LoRA, arXiv 2106.09685, eq. 3) that act only where an image is.

An LLM learns to write about images through them. Rows of text alone pass them by, so what the LLM writes there is what
it wrote before, token for token. Phi-4-Multimodal (arXiv 2503.01743, sec. 2.2) keeps its language model's answers by
the same means.
"""

from __future__ import annotations

import fnmatch
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.cpu_linear import CpuLinear
from lumen_ray.errors import UserError
from lumen_ray.trunk.settings import ImageAdapterSettings

_pass = threading.local()


@contextmanager
def _about_images(tokens: Tensor | None) -> Iterator[None]:
    """Context in which the adapters of this thread act on `tokens`: bool [B, T], None for no token."""
    before, _pass.tokens = getattr(_pass, "tokens", None), tokens
    try:
        yield
    finally:
        _pass.tokens = before


class AdaptedLinear(CpuLinear):
    """x W^T, and where x is about an image + (alpha / rank) x A^T B^T."""

    lora_A: nn.Parameter  # [rank, in]
    lora_B: nn.Parameter  # [out, rank], zeros at first
    scale: float

    def forward(self, input: Tensor) -> Tensor:
        """input [B, T, in] or [B * T, in] -> [B, T, out] or [B * T, out]."""
        out = super().forward(input)
        tokens: Tensor | None = getattr(_pass, "tokens", None)
        if tokens is None:
            return out
        change = F.linear(F.linear(input, self.lora_A), self.lora_B * self.scale)
        return out + change.masked_fill(~tokens.reshape(input.shape[:-1])[..., None], 0.0)


class _AdaptedBlock:
    """A block of the LLM that tells its layers which tokens are about images, also when it is computed again for
    gradients."""

    def forward(self, *args: Any, image_tokens: Tensor | None = None, **kwargs: Any) -> Any:
        with _about_images(image_tokens):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@cache
def _adapted_class(block: Any) -> Any:
    """The class of blocks of class `block` that have adapters."""
    return type(f"Adapted{block.__name__}", (_AdaptedBlock, block), {})


def adapt(llm: Any, settings: ImageAdapterSettings) -> None:
    """Gives the linear layers in the LLM's blocks adapters, in place. The blocks then take `image_tokens` (bool [B, T],
    None for no token), which a call of the LLM passes on to them. The names of the weights do not change. Raises
    `UserError` if a target fits no layer."""
    blocks = llm.model.layers
    layers = {name: layer for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear)}
    for pattern in settings.targets:
        if not (matches := fnmatch.filter(layers, pattern)):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(
                f"image_adapters.targets: '{pattern}' fits no layer of the LLM; layers are called {known}", "no_match"
            )
        for name in matches:
            _adapt_layer(layers[name], settings)
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _adapted_class(kind)


def _adapt_layer(layer: nn.Linear, settings: ImageAdapterSettings) -> None:
    if isinstance(layer, AdaptedLinear):  # by another pattern
        return
    cast("nn.Module", layer).__class__ = AdaptedLinear
    adapted = cast("AdaptedLinear", layer)
    adapted.scale = settings.alpha / settings.rank
    down = torch.empty(settings.rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    adapted.lora_A = nn.Parameter(down)
    adapted.lora_B = nn.Parameter(torch.zeros(layer.out_features, settings.rank))
