"""Building a model whose published parts get their weights from a checkpoint: they are not initialised first, which for
a large LLM takes minutes and its whole size in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_LATER = ContextVar("weights_come_later", default=False)


@contextmanager
def weights_come_later() -> Iterator[None]:
    """Within it, `published` parts are built on the meta device; all others get fresh weights as ever."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


def published(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes: a part that has published weights."""
    if not _LATER.get():
        return build()
    with torch.device("meta"):
        return build()
