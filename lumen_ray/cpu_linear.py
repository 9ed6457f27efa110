"""Linear layers on CPUs, in float32, by oneDNN instead of the BLAS that torch is linked with.

Wheels of torch bring MKL, which on AMD leaves out the wide instructions: oneDNN takes 0.4 to 0.5 of its time there, in
both directions (torch 2.13, one thread of an EPYC, widths 64 to 1,536). Calling it costs 10 us, so small products stay
with BLAS.

In passes of few rows, such as the steps that write text, reading the weights costs most, and `nn.Linear` rearranges
them in every call. Within `packed_weights` they are read in oneDNN's own order, made once. That copy takes as much
memory as the weights.

oneDNN and torch each keep a compiled product for every shape they have met, 1,024 by default. In training each holds a
copy of its weights, and there are new shapes in every step: gigabytes. Fewer are kept here (`MOST_SHAPES`); making
one anew takes 0.4 ms.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Multiplications from which a product is oneDNN's.
LEAST_WORK = 1 << 20
#: Rows up to which packed weights are used, and weights of a layer from which packing pays.
MOST_PACKED_ROWS = 64
LEAST_PACKED_WEIGHTS = 1 << 16
#: Bytes of weights up to which a model's are packed.
MOST_PACKED_BYTES = 2 << 30

#: Compiled products that are kept: more than a step of training needs.
MOST_SHAPES = 256

for _variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # read when the first is compiled
    os.environ.setdefault(_variable, str(MOST_SHAPES))

_OPS: Any = torch.ops.mkldnn
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(_OPS, "_reorder_linear_weight")

_packed = threading.local()


@contextmanager
def packed_weights() -> Iterator[None]:
    """Context in which the layers of this thread that `pack` names use packed weights."""
    before, _packed.used = getattr(_packed, "used", False), True
    try:
        yield
    finally:
        _packed.used = before


class CpuLinear(nn.Linear):
    """`nn.Linear` that computes with oneDNN where torch has it and it is faster."""

    packs = False  # whether a packed copy of the weights may be made
    _copy: tuple[Tensor, int, Tensor] | None = None  # the weights, their version, and the packed ones

    def forward(self, input: Tensor) -> Tensor:
        weight, rows = self.weight, input.shape[:-1].numel()
        if (
            not (_HAS_ONEDNN and torch.backends.mkldnn.enabled)
            or not rows
            or weight.device.type != "cpu"
            or weight.dtype != torch.float32
            or input.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return F.linear(input, weight, self.bias)
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, self.bias))
        packed = self.packs and not learns and rows <= MOST_PACKED_ROWS and getattr(_packed, "used", False)
        if not packed and rows * weight.numel() < LEAST_WORK:
            return F.linear(input, weight, self.bias)
        flat = input.reshape(rows, -1)
        if learns:
            out = cast("Tensor", _Product.apply(flat, weight, self.bias))
        else:
            out = _product(flat, self._packed_weights() if packed else weight, self.bias)
        return out.view(*input.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights, which can be neither copied nor pickled."""
        return {**self.__dict__, "_copy": None}

    def _packed_weights(self) -> Tensor:
        """The packed weights, packed again if the weights have been replaced or changed in place. Changes that torch
        does not count are not seen: of `weight.data`, and of inference tensors."""
        version = 0 if self.weight.is_inference() else self.weight._version  # inference tensors have none
        if self._copy is None or self._copy[0] is not self.weight or self._copy[1] != version:
            self._copy = self.weight, version, _OPS._reorder_linear_weight(self.weight.detach())
        return self._copy[2]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [N, I], weight [O, I] -> [N, O]."""
    return _OPS._linear_pointwise(rows, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`_product` with gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if of_weight else None, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable  # the products below are not recorded
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if of_rows else None,
            _product(grad.t(), rows.t()) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def use_onednn(module: nn.Module) -> None:
    """Turns the plain linear layers of a module into `CpuLinear`, in place; weights and state dict stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            cast("nn.Module", layer).__class__ = CpuLinear


def pack(module: nn.Module) -> None:
    """Lets the linear layers of a module read packed weights, unless they are larger than `MOST_PACKED_BYTES`."""
    layers = [layer for layer in module.modules() if isinstance(layer, CpuLinear)]
    if sum(layer.weight.nbytes for layer in layers) > MOST_PACKED_BYTES:
        return
    for layer in layers:
        layer.packs = layer.weight.numel() >= LEAST_PACKED_WEIGHTS
