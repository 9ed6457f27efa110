"""The training batch: what the collator makes of shard rows, and what a model takes.

Imports torch alone, so that a machine without Ray can run training steps on batches that another one made.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen_ray.targets import ImageTargets, PerceptionTargets, Pixels

if TYPE_CHECKING:
    from lumen_ray.trunk.layout import Layout


@dataclass
class TrainingBatch:
    """One micro-step of one rank: B images with their prompts, and what each prompt should give.

    Packed (`layout.pack` is set), rows with an image come first and `images` holds those alone.
    """

    #: uint8 [B, 3, H, W]: the trunk's input, padded at the right and the bottom
    images: Tensor
    #: int64 [B, 2]: (height, width) of the part of each image that is not padding, in input pixels
    extents: Tensor
    #: bool [rows]: False for rows whose prompts see no image
    has_image: Tensor
    #: token ids, labels, positions and slots of all prompts
    layout: Layout
    #: the task of each prompt (branch)
    tasks: list[str]
    #: uint8 [R, H, W]: masks of region prompts in the trunk's input; `region_images` int64 [R]: the image of each
    region_masks: Tensor
    region_images: Tensor
    #: by link family in the frame of `images`, and by decoder for those with an input size of their own
    targets: dict[str, PerceptionTargets | ImageTargets]
    #: by decoder: images in its own input size, for decoders that have one
    pixels: dict[str, Pixels] = field(default_factory=dict)
    #: of every row
    image_ids: list[str] = field(default_factory=list)
    #: decoders that learn from this batch, the same on all ranks; None: all that the model has
    decoders: Collection[str] | None = None
    #: tasks whose prompts the batch may hold, the same on all ranks; None: any
    possible_tasks: Collection[str] | None = None
    step: int = 0
    #: images that could not be decoded, as {image_id, reason}
    rejected: list[dict[str, Any]] = field(default_factory=list)
    #: branches and tokens left out of packed rows, where any were
    truncated: dict[str, int] = field(default_factory=dict)
    #: seconds that reading, decoding and laying out took
    read_s: float = 0.0

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch with its tensors on `device`. Decoders that share pixels or targets go on sharing them."""
        moved: dict[int, Any] = {}

        def move(value: Any) -> Any:
            if id(value) not in moved:
                moved[id(value)] = value.to(device)
            return moved[id(value)]

        return replace(
            self,
            images=self.images.to(device),
            extents=self.extents.to(device),
            has_image=self.has_image.to(device),
            layout=self.layout.to(device),
            region_masks=self.region_masks.to(device),
            region_images=self.region_images.to(device),
            targets={name: move(value) for name, value in self.targets.items()},
            pixels={name: move(value) for name, value in self.pixels.items()},
        )
