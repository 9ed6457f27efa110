"""Images in the trunk's input, and what the trunk has made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.transforms import PAD_VALUE, fit
from lumen_ray.data.images import Picture, as_picture
from lumen_ray.structures import Size
from lumen_ray.targets import Frame
from lumen_ray.trunk.prefix import Prefix


@dataclass
class Inputs:
    """A batch in the trunk's frame: an image per row, the last one of a conversation with several.

    `images`: as given; `pixels`: uint8 [B, 3, H, W] on the CPU; `frames`: where each image lies in its
    input; `valid`: bool [B], False for text alone; `earlier`: the earlier images of conversations, uint8 [E, 3, H, W],
    and `earlier_rows` the row of each, ascending.
    """

    images: list[Picture]
    pixels: Tensor
    frames: list[Frame]
    valid: Tensor
    earlier: Tensor
    earlier_rows: list[int]

    @property
    def numbers(self) -> list[int]:
        """How many images each row has; 1 for text alone too."""
        earlier = Counter(self.earlier_rows)
        return [1 + earlier[row] for row in range(len(self.images))]

    def select(self, row: int) -> Inputs:
        """One row, without earlier images."""
        rows = slice(row, row + 1)
        return Inputs(self.images[rows], self.pixels[rows], self.frames[rows], self.valid[rows], self.earlier[:0], [])

    @classmethod
    def concat(cls, batches: Sequence[Inputs]) -> Inputs:
        """The rows of several batches of one input size, none of them with earlier images."""
        assert not any(batch.earlier_rows for batch in batches)
        return cls(
            [image for batch in batches for image in batch.images],
            torch.cat([batch.pixels for batch in batches]),
            [frame for batch in batches for frame in batch.frames],
            torch.cat([batch.valid for batch in batches]),
            batches[0].earlier[:0],
            [],
        )

    @property
    def conversations(self) -> dict[int, list[int]]:
        """By row with several images, the index of each in `pixels` with `earlier` behind them, in order."""
        members: dict[int, list[int]] = {}
        for index, row in enumerate(self.earlier_rows, len(self.pixels)):
            members.setdefault(row, []).append(index)
        return {row: [*earlier, row] for row, earlier in members.items()}


def fit_images(rows: Sequence[Sequence[np.ndarray | Picture]], bucket: Size) -> Inputs:
    """Fits images into an input of (height, width) `bucket`; `rows`: the images of each row in order,
    none for text alone."""
    stored = [as_picture(row[-1] if row else np.full((*bucket, 3), PAD_VALUE, np.uint8)) for row in rows]
    fitted = [fit(image, bucket) for image in stored]
    earlier = [(n, fit(image, bucket)[0]) for n, row in enumerate(rows) for image in row[:-1]]
    pixels = _as_tensor([image for image, _ in fitted])
    return Inputs(
        stored,
        pixels,
        [frame for _, frame in fitted],
        torch.tensor([bool(row) for row in rows]),
        _as_tensor([image for _, image in earlier]) if earlier else pixels[:0],
        [row for row, _ in earlier],
    )


def _as_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Images uint8 [H, W, 3] as a tensor [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@dataclass
class EncodedImages:
    """A batch of images of one bucket that is encoded once, for any number of calls. Holds their keys and values, and
    their dense features where a decoder reads them.

    `conversations`: by row, what texts are written about where a row has several images; `prefix` has the last of them,
    which decoders look at.
    """

    inputs: Inputs
    prefix: Prefix
    conversations: dict[int, Prefix]

    def __len__(self) -> int:
        return len(self.inputs.images)

    def select(self, row: int) -> EncodedImages:
        """A single image of a batch without conversations, with tensors of its own."""
        inputs = self.inputs.select(row)
        return EncodedImages(replace(inputs, pixels=inputs.pixels.clone()), self.prefix.select([row]), {})

    @classmethod
    def concat(cls, batches: Sequence[EncodedImages]) -> EncodedImages:
        """The images of several batches of one input size without conversations."""
        if len(batches) == 1:
            return batches[0]
        return cls(Inputs.concat([b.inputs for b in batches]), Prefix.concat([b.prefix for b in batches]), {})

    @property
    def nbytes(self) -> int:
        """Bytes of what was encoded and of the images as they were given."""
        stored = sum(image.pixels.nbytes for image in self.inputs.images)
        return stored + self.inputs.pixels.nbytes + self.prefix.nbytes
