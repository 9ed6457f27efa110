"""Linear layers for decoding steps on CPUs, whose input has a row per answer.

`nn.Linear` has its weights rearranged anew in every call, which for few rows costs more than the product. Here they are
packed once, in oneDNN's order, as compiled models do: 1.3 times as fast at one row, 2 to 3 times at 16 (float32, one
thread, torch 2.13, widths 576 to 49,152). The packed copy takes as much memory as the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Rows up to which packed weights are used.
MOST_ROWS = 64
#: Bytes of weights up to which a model's are packed.
MOST_BYTES = 2 << 30
#: Weights of a layer from which packing pays; in smaller ones the call itself takes longer than the product.
LEAST_WEIGHTS = 1 << 16

_step = threading.local()


@contextmanager
def decoding_rows() -> Iterator[None]:
    """Context of a decoding step, in which the layers of this thread use packed weights."""
    _step.runs = True
    try:
        yield
    finally:
        _step.runs = False


class StepLinear(nn.Linear):
    """`nn.Linear` that in a decoding step reads packed weights, in float32 on a CPU."""

    _packed: tuple[tuple[int, int], Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        rows = input.shape[:-1].numel()
        if (
            not getattr(_step, "runs", False)
            or not 0 < rows <= MOST_ROWS
            or self.weight.device.type != "cpu"
            or self.weight.dtype != torch.float32
            or input.dtype != torch.float32
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(input, self.weight, self.bias)
        ops: Any = torch.ops.mkldnn
        flat = input.reshape(rows, -1)
        return ops._linear_pointwise(flat, self._weights(), self.bias, "none", [], "").view(*input.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights, which can be neither copied nor pickled."""
        return {**self.__dict__, "_packed": None}

    def _weights(self) -> Tensor:
        """The packed weights, packed again if the weights have changed."""
        version = 0 if self.weight.is_inference() else self.weight._version  # inference tensors have none
        state = self.weight.data_ptr(), version
        if self._packed is None or self._packed[0] != state:
            ops: Any = torch.ops.mkldnn
            self._packed = state, ops._reorder_linear_weight(self.weight.detach())
        return self._packed[1]


def use_step_linears(module: nn.Module) -> None:
    """Turns the plain linear layers of a module into `StepLinear`, in place; weights and state dict stay. Leaves them
    where torch lacks oneDNN, and if they are larger than `MOST_BYTES`."""
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not known or sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
        return
    for layer in layers:
        if layer.weight.numel() < LEAST_WEIGHTS:
            continue
        cast("nn.Module", layer).__class__ = StepLinear
        layer._packed = None  # type: ignore[assignment]
