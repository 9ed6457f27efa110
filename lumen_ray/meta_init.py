"""Building a model that gets its weights from a file: they are not drawn first, which for a large LLM takes minutes
and its whole size in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import swap_tensors

_LATER = ContextVar("published_parts_on_meta", default=False)


@contextmanager
def published_parts_on_meta() -> Iterator[None]:
    """Within it, parts made by `published_part` are built on the meta device; all others get fresh weights as ever."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


def published_part(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes: a part that has published weights."""
    if not _LATER.get():
        return build()
    with torch.device("meta"):
        return build()


@contextmanager
def on_meta() -> Iterator[None]:
    """Within it, parameters of modules are put on the meta device as soon as they belong to one, before most are drawn.
    Buffers are computed as ever: no file has those that are not persistent."""
    thread = threading.get_ident()  # what others build meanwhile is not concerned

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that are saved with the weights, by name."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def put_weights(module: nn.Module, read: Callable[[str], Tensor], device: torch.device | str) -> None:
    """Puts a module built `on_meta` on a device: `read` gives the values of its parameters that are on the meta
    device, and of its persistent buffers, by name.

    It is asked for one after the other, and what it gives is kept where type and device are right, so that no second
    copy of the weights is needed. Tied parameters stay tied and are asked for once.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            values = read(name).to(device, parameter.dtype)
            swap_tensors(parameter, nn.Parameter(values, parameter.requires_grad))
    with torch.no_grad():
        for name, buffer in persistent_buffers(module).items():
            buffer.copy_(read(name))
    module.to(device)
