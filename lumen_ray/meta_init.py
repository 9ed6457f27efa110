"""Building models on the meta device before their weights are read from a file: random initialisation of a large LLM
would take minutes and memory for the whole model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import swap_tensors

_ON_META = ContextVar("published_parts_on_meta", default=False)
_Module = TypeVar("_Module", bound=nn.Module)


@contextmanager
def published_parts_on_meta() -> Iterator[None]:
    """Context in which modules built by `published_part` are put on the meta device; others are initialised as
    usual."""
    token = _ON_META.set(True)
    try:
        yield
    finally:
        _ON_META.reset(token)


def published_part(build: Callable[[], _Module]) -> _Module:
    """Builds a module that has published weights; see `published_parts_on_meta`."""
    if not _ON_META.get():
        return build()
    with torch.device("meta"):
        return build()


@contextmanager
def on_meta() -> Iterator[None]:
    """Context in which parameters move to the meta device as they are registered, before most are initialised.
    Buffers are computed as usual, since no file holds the non-persistent ones."""
    thread = threading.get_ident()  # modules built meanwhile in other threads are left alone

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # torch registers what the hook returns, though its annotation says None
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state dict, by name."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def put_weights(module: nn.Module, read: Callable[[str], Tensor], device: torch.device | str) -> None:
    """Moves a module built `on_meta` to a device. `read` returns the values of a meta parameter, or of a persistent
    buffer, by name.

    Tensors are read one by one and used without a copy if their dtype and device are right, so the weights are never in
    memory twice. Tied parameters stay tied and are read once.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            values = read(name).to(device, parameter.dtype)
            swap_tensors(parameter, nn.Parameter(values, parameter.requires_grad))
    with torch.no_grad():
        for name, buffer in persistent_buffers(module).items():
            buffer.copy_(read(name))
    module.to(device)
