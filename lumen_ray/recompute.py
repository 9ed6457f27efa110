"""Activations that are computed again in the backward pass instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """What `run` gives, on a device, of these arguments, which alone are kept.

    The second time it draws the same random numbers: torch saves the state of the generators of those devices that
    tensors among the arguments are on. It looks neither into dataclasses nor at keywords, so one is put among them.
    """
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    place = torch.empty(0, device=device)
    return checkpoint(lambda _, *own, **named: run(*own, **named), place, *args, use_reentrant=False, **kwargs)
