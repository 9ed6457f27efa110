"""The placement of an image in the model input, and the targets of a training batch in that frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen_ray.keypoints import DEFAULT_SIGMA
from lumen_ray.structures import Size, as_size

#: stride in input pixels of the dense features, and of the masks that decoders train on and predict
MASK_STRIDE = 4


@dataclass(frozen=True)
class Frame:
    """Placement of an image in the model input: scaled by `scale`, at the top left, padded to `input_size`."""

    size: Size  # (height, width) of the EXIF-rotated image, pixels
    scale: float
    input_size: Size

    @property
    def extent(self) -> Size:
        """(height, width) of the image in the input, in whole pixels; the rest is padding."""
        height, width = (
            min(side, max(1, math.ceil(stored * self.scale)))
            for stored, side in zip(self.size, self.input_size, strict=True)
        )
        return height, width

    @classmethod
    def fit(cls, size: Size, input_size: int | Size) -> Frame:
        """The frame of an image scaled to the largest size that fits the input."""
        height, width = as_size(input_size)
        return cls((int(size[0]), int(size[1])), min(height / size[0], width / size[1]), (height, width))


@dataclass
class Pixels:
    """Input of an expert decoder with its own image backbone.

    `images` uint8 [B, 3, H, W], the trunk's input or images in the decoder's input size; `extents` int64 [B, 2]:
    (height, width) of each image at the top left; the rest is padding.
    """

    images: Tensor
    extents: Tensor

    def to(self, device: torch.device | str) -> Pixels:
        return Pixels(self.images.to(device), self.extents.to(device))

    @classmethod
    def stack(cls, images: Sequence[Tensor], extents: Sequence[Size] | None = None) -> Pixels:
        """Pads images uint8 [3, h, w] of any sizes to the largest; `extents`: (height, width) of each without padding,
        by default its full size."""
        shapes = [tuple(image.shape[1:]) for image in images]
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, shapes, strict=True)]
        return cls(torch.stack(padded), torch.tensor(extents or shapes))

    def valid(self) -> Tensor:
        """bool [B, H, W], False at padding."""
        height, width = self.images.shape[-2:]
        y = torch.arange(height, device=self.images.device)
        x = torch.arange(width, device=self.images.device)
        return (y < self.extents[:, :1])[:, :, None] & (x < self.extents[:, 1:])[:, None, :]


@dataclass
class PerceptionTargets:
    """Ground truth of P perception prompts, in input pixels (the frame of `Frame`).

    `boxes` float32 [P, G, 4] xyxy, padded; `valid`, `crowd` bool [P, G]; `mask_index` int64 [P, G] into `masks`
    uint8 [M, H/4, W/4], the covered share of each cell in 255ths (see `coverage`), or -1; `keypoints` float32
    [P, G, 3], for keypoint prompts: the keypoint in each instance of the parent prompt (v = 0 where unlabelled).
    `counted` bool [P]: False for prompts without detection targets. `instance` int64 [P, G]: index of the instance
    within its image, -1 at padding; prompts may share an instance. By default all are distinct. `sigma` float32 [P],
    for keypoint prompts: the keypoint's OKS sigma (`keypoints.keypoint_sigmas`), by default `DEFAULT_SIGMA`.
    """

    boxes: Tensor
    valid: Tensor
    crowd: Tensor
    mask_index: Tensor
    masks: Tensor
    keypoints: Tensor
    counted: Tensor
    instance: Tensor = None  # type: ignore[assignment]  # __post_init__ replaces None
    sigma: Tensor = None  # type: ignore[assignment]  # __post_init__ replaces None

    def __post_init__(self) -> None:
        if self.sigma is None:
            self.sigma = torch.full_like(self.counted, DEFAULT_SIGMA, dtype=torch.float32)
        if self.instance is None:
            numbers = torch.arange(self.valid.numel(), device=self.valid.device).view(self.valid.shape)
            self.instance = numbers.masked_fill(~self.valid, -1)

    def to(self, device: torch.device | str) -> PerceptionTargets:
        return PerceptionTargets(**{name: value.to(device) for name, value in self.__dict__.items()})

    def coverage(self, index: Tensor) -> Tensor:
        """The masks at `index` int64 [N], float32 [N, H/4, W/4] in 0..1: how much of each cell is covered.

        Not just whether most of it is: at stride 4 a contour between cells is then at the right place once upsampled,
        and parts narrower than a cell are kept.
        """
        return self.masks[index].float() / 255

    def select(self, members: Tensor) -> PerceptionTargets:
        """The targets of the prompts at `members`, int64 [M]."""
        per_prompt = {name: value[members] for name, value in self.__dict__.items() if name != "masks"}
        return PerceptionTargets(masks=self.masks, **per_prompt)


@dataclass
class ImageTargets:
    """Target images of G generation or editing prompts: `images` uint8 [G, 3, H, W], in their training size.

    `extents` int64 [G, 2], as in `Pixels`: (height, width) of each image without padding, a size that the decoder can
    generate; None: no padding. The target of an edit lies in the same frame as its source image. `caption_ids` int64
    [G, L]: each image's caption, or the edit instruction, as ids of the CLIP text encoder's tokenizer; None if the
    model has no such tokenizer.
    """

    images: Tensor
    extents: Tensor | None = None
    caption_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> ImageTargets:
        return self._map(lambda value: value.to(device))

    def select(self, members: Tensor) -> ImageTargets:
        """The targets of the prompts at `members`, int64 [M]."""
        return self._map(lambda value: value[members])

    def _map(self, change: Callable[[Tensor], Tensor]) -> ImageTargets:
        optional = (None if value is None else change(value) for value in (self.extents, self.caption_ids))
        return ImageTargets(change(self.images), *optional)
