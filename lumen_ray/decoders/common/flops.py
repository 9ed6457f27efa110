"""Counts the floating-point operations of a decoder's training step.

A multiply-add counts as two. Only matrix products and convolutions are counted, as is usual for model FLOPs utilisation
(PaLM, arXiv 2204.02311, app. B); recomputation by activation checkpointing is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lumen_ray.structures import Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Pixels


@dataclass(frozen=True)
class DecoderWork:
    """The input of a decoder in one micro-batch.

    `link`: of the prompts it serves, without embeddings; `pixels`, `targets`: as in its training step, for those
    prompts; `num_images` and `input_size`: of the trunk's input, (height, width) in pixels; `needs_input_grad`: whether
    gradients flow into the link and the dense features; `build`: builds another instance of the decoder, to be counted
    on the meta device.
    """

    link: SuperLink
    pixels: Pixels
    targets: Any
    num_images: int
    input_size: Size
    needs_input_grad: bool
    build: Callable[[], nn.Module]


def is_trainable(module: nn.Module | None) -> bool:
    """Whether any parameter of the module requires a gradient."""
    return module is not None and any(p.requires_grad for p in module.parameters())


def convolutions(module: nn.Module, height: int, width: int) -> tuple[float, int, int]:
    """(FLOPs, height, width) after all convolutions of a sequential module, for one image."""
    total = 0.0
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            height, width = math.ceil(height / conv.stride[0]), math.ceil(width / conv.stride[0])
            total += 2.0 * height * width * conv.in_channels * conv.out_channels * math.prod(conv.kernel_size)
    return total, height, width


def products(module: nn.Module, rows: Callable[[str], float]) -> float:
    """FLOPs of all linear layers of a module; `rows`: name of a layer -> rows of its input."""
    linear = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear))
    return sum(2.0 * rows(name) * m.in_features * m.out_features for name, m in linear)


class LibraryFlops:
    """Forward FLOPs of library modules, by torch's `FlopCounterMode` on a copy on the meta device. Each kind of input
    is counted once."""

    def __init__(self, build: Callable[[], nn.Module]):
        with torch.device("meta"):
            self.module: Any = build()
        self._known: dict[Any, float] = {}

    def count(self, key: Any, run: Callable[[], Any]) -> float:
        """FLOPs of `run`, which must compute on the meta device; `key` identifies the kind of input."""
        if key not in self._known:
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), torch.device("meta"), counter:
                run()
            self._known[key] = float(counter.get_total_flops())
        return self._known[key]


_counters: WeakKeyDictionary[nn.Module, LibraryFlops] = WeakKeyDictionary()


def library_flops(decoder: nn.Module, build: Callable[[], nn.Module]) -> LibraryFlops:
    """The counter of a decoder, cached for the decoder's lifetime."""
    if decoder not in _counters:
        _counters[decoder] = LibraryFlops(build)
    return _counters[decoder]
