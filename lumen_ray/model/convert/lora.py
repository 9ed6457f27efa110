"""Merges LoRA adapters (arXiv 2106.09685, sec. 4.1) saved beside the weights they adapt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from lumen_ray.errors import UserError

_ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


class Merged(Mapping[str, Tensor]):
    """The tensors of a checkpoint, with W + alpha / rank * B A in place of each adapted W. `alpha`: that of the
    training."""

    def __init__(self, tensors: Mapping[str, Tensor], alpha: float):
        self.tensors = tensors
        self.alpha = alpha
        self.adapters: dict[str, dict[str, str]] = {}  # adapted weight -> {"A": name, "B": name}
        for name in tensors:
            if match := _ADAPTER.fullmatch(name):
                self.adapters.setdefault(self._adapted(match[1]), {})[match[2]] = name
        for weight, pair in self.adapters.items():
            if len(pair) < 2:
                raise UserError(
                    f"the LoRA adapter of '{weight}' has only one of its two matrices: {pair}", "damaged_checkpoint"
                )

    def _adapted(self, module: str) -> str:
        for name in (f"{module}.base_layer.weight", f"{module}.weight"):
            if name in self.tensors:
                return name
        raise UserError(f"'{module}' has a LoRA adapter but no weight to add it to", "damaged_checkpoint")

    @property
    def merged(self) -> dict[str, str]:
        """{name of an adapter's tensor: the weight it is merged into}."""
        return {matrix: weight for weight, pair in self.adapters.items() for matrix in pair.values()}

    def __getitem__(self, name: str) -> Tensor:
        weight = self.tensors[name]
        if name not in self.adapters:
            return weight
        down, up = (self.tensors[self.adapters[name][matrix]].float() for matrix in "AB")
        return (weight.float() + self.alpha / len(down) * (up @ down)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        merged = self.merged
        return (name for name in self.tensors if name not in merged)

    def __len__(self) -> int:
        return len(self.tensors) - 2 * len(self.adapters)
