"""fp32 or mixed bf16 precision, in training and inference.

Autocast computes matrix products in bf16, and sums, norms and losses in fp32. In inference the weights of linear
layers, convolutions and embeddings, nearly all of a model, are stored in bf16 as well. Boxes stay fp32, and so do the
submodules that a decoder lists in `exact`.
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


def autocast_context(low: bool, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass: bf16 autocast if `low`, else none. Autocast's cache is off: it would keep a
    second copy of all weights."""
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if low else nullcontext()


def cast_weights_(module: nn.Module, dtype: Dtype) -> None:
    """Casts a module's weights to `dtype` in place; on the meta device, those that are loaded later. Idempotent."""
    if dtype == "float32":
        return
    exact: set[nn.Module] = set()
    for path in getattr(module, "exact", ()):
        submodule = module.get_submodule(path)
        exact |= set(submodule.modules())
        for method in ("forward", "encode", "decode"):
            if hasattr(submodule, method) and method not in vars(submodule):
                setattr(submodule, method, _in_fp32(getattr(submodule, method)))
    for submodule in module.modules():
        if isinstance(submodule, _PRODUCTS) and submodule not in exact:
            submodule.to(getattr(torch, dtype))


def _in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of a module with fp32 weights, so that it takes tensors of any precision."""

    @wraps(method)
    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(first.float(), *args, **kwargs)

    return run


def in_model_dtype(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of an object with `device` and `dtype`: it runs in that precision, without gradients."""

    @wraps(run)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), autocast_context(self.dtype == "bfloat16", self.device):
            return run(self, *args, **kwargs)

    return wrapped
