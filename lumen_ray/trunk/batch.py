"""The training batch: built by the collator from shard rows, consumed by `Generalist.forward`.

Imports only torch, so that a machine without Ray can run training steps on batches made elsewhere.
"""

from __future__ import annotations

from collections import Counter
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
    """One micro-batch of one rank: B images with their prompts and targets.

    If packed (`layout.pack` is set), rows with an image come first and `images` holds only those.
    """

    #: uint8 [B, 3, H, W]: the trunk's input, padded at the right and the bottom
    images: Tensor
    #: int64 [B, 2]: (height, width) of each image without padding, in input pixels
    extents: Tensor
    #: bool [rows]: False for rows whose prompts attend to no image
    has_image: Tensor
    #: token ids, labels, positions and slots of all prompts
    layout: Layout
    #: the task of each prompt (branch)
    tasks: list[str]
    #: uint8 [R, H, W]: masks of region prompts in the trunk's input; `region_images` int64 [R]: the image of each
    region_masks: Tensor
    region_images: Tensor
    #: by link family in the frame of `images`, and by decoder name for decoders with an input size rule
    targets: dict[str, PerceptionTargets | ImageTargets]
    #: by decoder name: images in the decoder's input size, for decoders with an input size rule
    pixels: dict[str, Pixels] = field(default_factory=dict)
    #: uint8 [E, 3, H, W]: the images of rows beyond their first, in the size of `images`; `further_rows` int64 [E]: the
    #: row of the batch that each belongs to, nondecreasing; the images of a row in their order
    further_images: Tensor = field(default_factory=lambda: torch.zeros(0, 3, 1, 1, dtype=torch.uint8))
    further_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    #: image id of every row
    image_ids: list[str] = field(default_factory=list)
    #: source and place in the shards of every row, e.g. "coco" and "part-00000.parquet, row group 3, row 1"
    sources: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    #: decoders trained on this batch, the same on all ranks; None: all of the model's
    decoders: Collection[str] | None = None
    #: whether texts are learned from the LLM's own probabilities, as they are without adapters; the same on all ranks
    distil: bool = False
    #: tasks that may occur in the batch, the same on all ranks; None: any
    possible_tasks: Collection[str] | None = None
    step: int = 0
    #: images that could not be decoded: {image_id, reason, file, row_group, row}
    rejected: list[dict[str, Any]] = field(default_factory=list)
    #: numbers of branches and tokens dropped from packed rows, if any
    truncated: dict[str, int] = field(default_factory=dict)
    #: seconds spent on reading, decoding and layout
    read_s: float = 0.0

    @property
    def most_images(self) -> int:
        """Most images of a row."""
        return 1 + max(Counter(self.further_rows.tolist()).values(), default=0)

    def rows(self, rows: Tensor) -> TrainingBatch:
        """Some rows, int64 ascending, as the trunk reads them: images and prompts without regions and targets."""
        return TrainingBatch(
            images=self.images[rows],
            extents=self.extents[rows],
            has_image=self.has_image[rows],
            layout=self.layout.rows(rows),
            tasks=[],
            region_masks=self.region_masks[:0],
            region_images=self.region_images[:0],
            targets={},
            decoders=self.decoders,
        )

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch with its tensors on `device`. Pixels and targets shared by decoders stay shared."""
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
            further_images=self.further_images.to(device),
            further_rows=self.further_rows.to(device),
            targets={name: move(value) for name, value in self.targets.items()},
            pixels={name: move(value) for name, value in self.pixels.items()},
        )
