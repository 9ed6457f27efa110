"""An exponential moving average of the weights, sharded like them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lumen_ray.recipe import EmaSettings
from lumen_ray.train.lora import changing_state


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, all of it if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Ema:
    """The average of all weights that training can change: a few passes over them per step, without communication."""

    def __init__(self, model: nn.Module, settings: EmaSettings):
        self.settings = settings
        self._model = model
        self.shadow = {name: value.detach().clone() for name, value in self._floating().items()}

    def _floating(self) -> dict[str, Tensor]:
        return {n: v for n, v in changing_state(self._model).items() if v.is_floating_point()}

    def decay(self, step: int) -> float:
        """The factor on the average at global step `step`; the new weights get the rest."""
        most = self.settings.decay
        return min(most, (1 + step) / (10 + step)) if self.settings.warmup else most

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after step `step` to the average."""
        weights = self._floating()
        shadow = [_local(value) for value in self.shadow.values()]
        torch._foreach_lerp_(shadow, [_local(weights[name]) for name in self.shadow], 1 - self.decay(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the average for weights, exchanged tensor by tensor."""
        names = list(self.shadow)
        self._exchange(names)
        try:
            yield
        finally:
            self._exchange(names[::-1])  # tied weights have two names: the last exchange is undone first

    @torch.no_grad()
    def _exchange(self, names: list[str]) -> None:
        weights = self._floating()
        for name in names:
            weight, average = _local(weights[name]), _local(self.shadow[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
