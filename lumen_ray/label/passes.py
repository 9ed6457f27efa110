"""Which images of a fragment share a pass of the model: those of one input size, as many as cost about the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from lumen_ray.structures import Size

T = TypeVar("T")


class Passes(Generic[T]):
    """Gathers images until a pass is full.

    A pass has `batch_size` images of the model's square input, whose side is `image_size` pixels, and more of smaller
    inputs, so that its cost and memory stay the same.
    """

    def __init__(self, batch_size: int, image_size: int):
        self._budget = batch_size * image_size**2
        self._waiting: dict[Size, list[T]] = {}

    def add(self, image: T, input_size: Size) -> list[T]:
        """The images of a pass that this one makes full, else none. `input_size`: (height, width) of its input."""
        waiting = self._waiting.setdefault(input_size, [])
        waiting.append(image)
        height, width = input_size
        return self._waiting.pop(input_size) if (len(waiting) + 1) * height * width > self._budget else []

    def rest(self) -> Sequence[list[T]]:
        """The passes that are not full, which are given out and forgotten."""
        rest = list(self._waiting.values())
        self._waiting = {}
        return rest
