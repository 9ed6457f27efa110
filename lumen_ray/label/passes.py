"""Which images of a fragment share a pass of the model: those of one input size, as many as cost about the same."""

from __future__ import annotations

from typing import Generic, TypeVar

from lumen_ray.structures import Size

T = TypeVar("T")
#: of pixels of images that wait for others; a large photograph is kept whole where it cannot be decoded smaller
MAX_BYTES = 128 << 20


class Passes(Generic[T]):
    """Gathers images until a pass is full.

    A pass has `batch_size` images of the model's square input, whose side is `image_size` pixels, and more of smaller
    inputs, so that its cost and memory stay the same.
    """

    def __init__(self, batch_size: int, image_size: int, max_bytes: int = MAX_BYTES):
        self._budget, self._max_bytes = batch_size * image_size**2, max_bytes
        self._waiting: dict[Size, list[T]] = {}
        self._bytes = dict[Size, int]()

    def add(self, image: T, input_size: Size, nbytes: int = 0) -> list[list[T]]:
        """The passes to run now: that which the image makes full, or all where more than `max_bytes` wait.

        input_size: (height, width) of its input; nbytes: of its pixels.
        """
        waiting = self._waiting.setdefault(input_size, [])
        waiting.append(image)
        self._bytes[input_size] = self._bytes.get(input_size, 0) + nbytes
        height, width = input_size
        if (len(waiting) + 1) * height * width > self._budget:
            del self._bytes[input_size]
            return [self._waiting.pop(input_size)]
        return self.rest() if sum(self._bytes.values()) > self._max_bytes else []

    def rest(self) -> list[list[T]]:
        """The passes that are not full, which are given out and forgotten."""
        rest = list(self._waiting.values())
        self._waiting, self._bytes = {}, {}
        return rest
