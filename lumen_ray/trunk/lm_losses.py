"""What the LLM learns from texts: the next token, or the probabilities that it gave it as published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.trunk.branch import IGNORE


def next_token_losses(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross entropy [B, T - 1] from hidden states [B, T, width]; only supervised positions go through the
    vocabulary projection."""
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    logits = lm_head(hidden[:, :-1][supervised])
    losses = torch.zeros(targets.shape, device=hidden.device)
    losses[supervised] = F.cross_entropy(logits.float(), targets[supervised], reduction="none")
    return losses


def distilled_losses(lm_head: nn.Module, hidden: Tensor, own: Tensor, labels: Tensor, published: int) -> Tensor:
    """Divergence [B, T - 1] of the next token's probabilities from those of the LLM as published, with the hidden
    states `own`; it gives tokens from `published` on none (0: it knows all)."""
    supervised = labels[:, 1:] != IGNORE
    with torch.no_grad():
        target = lm_head(own[:, :-1][supervised]).float()
        if published:
            target[:, published:] = -torch.inf
    logits = lm_head(hidden[:, :-1][supervised]).float()
    losses = torch.zeros(supervised.shape, device=hidden.device)
    losses[supervised] = F.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="none").sum(-1)
    return losses


@contextmanager
def without_adapters(llm: nn.Module) -> Iterator[None]:
    """Switches adapters of `peft` off. Its own switch would also freeze them."""
    adapted: list[Any] = [module for module in llm.modules() if hasattr(module, "_disable_adapters")]
    for module in adapted:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in adapted:
            module._disable_adapters = False
