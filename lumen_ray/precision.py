"""Arithmetic: fp32, or bf16 where it does not show, in training and where a model answers.

Autocast computes matrix products in bf16, and sums, norms and losses in fp32. Where a model answers, the weights of
linear layers, convolutions and embeddings, which are nearly all of it, are stored in bf16 as well. Boxes stay fp32, and
so does what a decoder names as `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

from lumen_ray.structures import Dtype

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)


def arithmetic(low: bool, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass, in bf16 with `low`. The cache of autocast is off: it would keep a second copy of
    all weights."""
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if low else nullcontext()


def lower(module: nn.Module, dtype: Dtype) -> None:
    """Stores a module's weights in `dtype`, in place; where it is on the meta device, those it will be given. What is
    done is not done a second time."""
    if dtype == "float32":
        return
    kept: set[nn.Module] = set()
    for path in getattr(module, "exact", ()):
        part = module.get_submodule(path)
        kept |= set(part.modules())
        for method in ("forward", "encode", "decode"):
            if hasattr(part, method) and method not in vars(part):
                setattr(part, method, _exactly(getattr(part, method)))
    for part in module.modules():
        if isinstance(part, _PRODUCTS) and part not in kept:
            part.to(getattr(torch, dtype))


def _exactly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module with fp32 weights, called with tensors of any precision."""

    @wraps(method)
    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(first.float(), *args, **kwargs)

    return run


def in_own_dtype(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method of something with a `device` and a `dtype`, run without gradients in that arithmetic."""

    @wraps(run)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), arithmetic(self.dtype == "bfloat16", self.device):
            return run(self, *args, **kwargs)

    return wrapped
