"""Inputs of decoders that take another image size than the trunk: the same samples, resampled from the stored images.

Crop, flip, turn, zoom and colours are those of the trunk's input; boxes, masks and keypoints are in pixels of the
decoder's input. Images to edit, and the targets of generation, have the size and shape that the decoder generates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.transforms import Sample, picture_of, resized
from lumen_ray.data.images import Picture
from lumen_ray.decoders.registry import DECODERS, serves
from lumen_ray.input_size import SizeRule
from lumen_ray.targets import Pixels
from lumen_ray.trunk.layout import Layout


@dataclass
class BatchImages:
    """The images of a batch: row, decoded image and sample of each. Text-only rows have a uniform grey one."""

    rows: Sequence[dict[str, Any]]
    pictures: Sequence[Picture]
    samples: Sequence[Sample]

    def resized(self, images: Collection[int], rule: SizeRule, skeletons: Mapping) -> list[Sample | None]:
        """The samples of the given images in the size of a rule; None for the others."""
        return [
            resized(self.samples[i], self.rows[i], self.pictures[i], rule, skeletons) if i in images else None
            for i in range(len(self.samples))
        ]

    def pictured(self, images: Collection[int], rule: SizeRule) -> list[np.ndarray | None]:
        """The given images, uint8 [h, w, 3], in the size of a rule; None for the others."""
        return [
            picture_of(self.samples[i], self.pictures[i], rule) if i in images else None
            for i in range(len(self.samples))
        ]


def prompted_images(layout: Layout, tasks: Sequence[str], decoder: str) -> set[int]:
    """Indices of the images of a batch that have prompts for `decoder`; `tasks`: by branch."""
    family = DECODERS[decoder].family
    if family not in layout.link_branches:
        return set()
    pairs = zip(layout.link_tasks(family, tasks), layout.link_images[family].tolist(), strict=True)
    return {image for task, image in pairs if serves(decoder, task)}


def as_tensor(image: np.ndarray) -> Tensor:
    """An image, uint8 [h, w, 3], as a tensor, uint8 [3, h, w]; copied."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def as_pixels(images: Sequence[np.ndarray | None]) -> Pixels:
    """Images, uint8 [h, w, 3], as one batch; a single unused pixel in place of None."""
    return Pixels.stack([torch.zeros(3, 1, 1, dtype=torch.uint8) if i is None else as_tensor(i) for i in images])
