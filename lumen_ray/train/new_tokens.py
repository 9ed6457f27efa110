"""Training only the rows of new tokens: the vocabulary of a published LLM that is frozen, or trained by adapters.

The routing and query tokens are new to the LLM, so their rows of the word embedding and of the output projection must
learn. The rows that the LLM was published with keep their bits: their gradients are set to zero, and the rows are not
decayed. AdamW with no gradient and no decay moves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lumen_ray.model.build import VOCABULARY, Generalist


def vocabulary(model: Generalist) -> list[nn.Parameter]:
    """The weights [tokens, width] with a row per token, tied ones once; empty if the LLM was not published."""
    if not model.settings.published_tokens:
        return []
    named = dict(model.named_parameters())
    return [named[name] for name in VOCABULARY if name in named]


def only_new_rows(model: Generalist) -> list[nn.Parameter]:
    """The weights of which only the rows of new tokens learn: the vocabulary, where it is trained and no other weight
    that the LLM was published with is."""
    trained = [p for p in vocabulary(model) if p.requires_grad]
    for name, p in model.trunk.llm.named_parameters():
        if p.requires_grad and ".lora_" not in name and not any(p is own for own in trained):
            return []
    return trained


class RowMask:
    """Sets gradients of published rows to zero, where `only_new_rows` learn; on a rank, those of its shard."""

    def __init__(self, model: Generalist):
        self.masks = [(p, _mask(p, model.settings.published_tokens)) for p in only_new_rows(model)]

    def apply(self) -> None:
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)


def _mask(parameter: nn.Parameter, published: int) -> Tensor:
    """1 in the rows of new tokens, else 0: [tokens, 1], sharded as the weight is."""
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    mask = (torch.arange(len(parameter), device=device) >= published).to(parameter.dtype)[:, None]
    if not isinstance(parameter, DTensor):
        return mask
    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)
