"""The repeated blocks of a model: activation checkpointing and compilation of each (`parallel` shards them).

The order matters: a block is checkpointed, then compiled, then sharded, so that the compiler sees the recomputation and
the hooks that gather a block's weights stay outside of both. `forward` is replaced on the instance, so the names of the
weights do not change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import Generalist

#: recompilations of one kind of block before PyTorch falls back to eager, over all shapes and stages
RECOMPILES = 64


def find_part(model: Generalist, name: str) -> nn.Module | None:
    """The module that recipes call `name` (`registry.PARTS`); None if the model lacks it."""
    if name in DECODERS:
        return dict(model.decoders.items()).get(name)
    return getattr(model.trunk, name)


def blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, block) of the members of every `ModuleList` that have submodules, outermost lists only."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not isinstance(child, nn.ModuleList):
            yield from blocks(child, f"{path}.")
            continue
        for index, block in child.named_children():
            if next(block.children(), None) is not None:
                yield f"{path}.{index}", block


def checkpoint_blocks(model: Generalist, parts: tuple[str, ...]) -> None:
    """Makes the blocks of these parts keep only their inputs and recompute activations in the backward pass."""
    for name in parts:
        checkpoint_module(find_part(model, name) or nn.Identity())


def checkpoint_module(module: nn.Module) -> None:
    """`checkpoint_blocks` for one module."""
    for _, block in blocks(module):
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint` preserves RNG state only for the devices of positional tensors, so pass one."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if any(isinstance(arg, torch.Tensor) for arg in args):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        tensor = next((value for value in kwargs.values() if isinstance(value, torch.Tensor)), None)
        return checkpoint(lambda _, *a, **k: forward(*a, **k), tensor, *args, use_reentrant=False, **kwargs)

    return run


def compile_blocks(model: Generalist, parts: tuple[str, ...], device: torch.device, backend: str = "inductor") -> None:
    """Compiles the blocks of these parts, each kind once, except those that a decoder lists as `eager`. A dimension
    that changes is compiled as dynamic."""
    for name in parts:
        if name == "llm":
            model.trunk.trains_in_blocks = False
        compile_module(find_part(model, name) or nn.Identity(), device, backend)


def compile_module(module: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """`compile_blocks` for one module."""
    if backend == "inductor":
        check_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    eager = getattr(module, "eager", ())
    for path, block in blocks(module):
        if not path.startswith(eager):
            block.forward = torch.compile(block.forward, backend=backend)


def check_compiler(device: torch.device) -> None:
    """Raises `UserError` if torch.compile cannot build kernels for the device."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        compiler = None
    if compiler is None or shutil.which(compiler) is None:
        raise UserError(
            "torch.compile needs a C++ compiler on CPU workers; install g++ or set compile: false", "no_compiler"
        )
