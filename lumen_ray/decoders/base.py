"""What every decoder is: forward, loss, predict. One file per decoder owns all three."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lumen_ray.keypoints import DEFAULT_SIGMA
from lumen_ray.structures import Prediction, Size, as_size

if TYPE_CHECKING:
    from lumen_ray.model.superlink import SuperLink


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the model input: scaled by `scale`, at the top left, padded to `input_size`."""

    size: Size  # (height, width) of the EXIF-rotated image, pixels
    scale: float
    input_size: Size

    @classmethod
    def fit(cls, size: Size, input_size: int | Size) -> Frame:
        """The frame of an image as large as the input holds it: one of its sides fills the input's."""
        height, width = as_size(input_size)
        return cls((int(size[0]), int(size[1])), min(height / size[0], width / size[1]), (height, width))


class LossTerm(NamedTuple):
    """A loss as a sum and its normaliser, so that the loop can divide by the normaliser of all ranks.

    That makes the loss of a global batch independent of how it is split over processes. A tuple, because FSDP finds
    the tensors it must watch only inside standard containers.
    """

    total: Tensor  # scalar with gradient
    count: Tensor  # scalar without
    each: Tensor | None = None  # detached share of every branch or link in `total`, for the per-task log


@dataclass
class Pixels:
    """What an expert decoder with its own image backbone looks at.

    `images` uint8 [B, 3, H, W], the model input; `extents` int64 [B, 2]: (height, width) of the part at the top left
    that shows the image, the rest is padding.
    """

    images: Tensor
    extents: Tensor

    def to(self, device: torch.device | str) -> Pixels:
        return Pixels(self.images.to(device), self.extents.to(device))

    def valid(self) -> Tensor:
        """bool [B, H, W], False at padding."""
        height, width = self.images.shape[-2:]
        y = torch.arange(height, device=self.images.device)
        x = torch.arange(width, device=self.images.device)
        return (y < self.extents[:, :1])[:, :, None] & (x < self.extents[:, 1:])[:, None, :]


@dataclass
class PerceptionTargets:
    """What P perception prompts should find, in input pixels (the frame of `Frame`).

    `boxes` float32 [P, G, 4] xyxy, padded; `valid`, `crowd` bool [P, G]; `mask_index` int64 [P, G] into `masks`
    uint8 [M, H/4, W/4] or -1; `keypoints` float32 [P, G, 3], for keypoint prompts: the keypoint in each instance of
    the parent prompt (v = 0 where unlabelled). `counted` bool [P]: False for prompts without detection targets.
    `instance` int64 [P, G]: which instance of its image an entry is, -1 at padding; prompts may name the same one.
    Where it is not given, no two do. `sigma` float32 [P], for keypoint prompts: how precisely the keypoint is placed
    (`keypoints.keypoint_sigmas`); where it is not given, the default.
    """

    boxes: Tensor
    valid: Tensor
    crowd: Tensor
    mask_index: Tensor
    masks: Tensor
    keypoints: Tensor
    counted: Tensor
    instance: Tensor | None = None
    sigma: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sigma is None:
            self.sigma = torch.full_like(self.counted, DEFAULT_SIGMA, dtype=torch.float32)
        if self.instance is None:
            numbers = torch.arange(self.valid.numel(), device=self.valid.device).view(self.valid.shape)
            self.instance = numbers.masked_fill(~self.valid, -1)

    def to(self, device: torch.device | str) -> PerceptionTargets:
        return PerceptionTargets(**{name: value.to(device) for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class PredictSettings:
    score_threshold: float = 0.05
    max_per_phrase: int = 100


@dataclass
class PromptSpec:
    """How the predictions of one link become part of an answer: its phrase, and what is asked for."""

    phrase: str
    masks: bool = False
    keypoints: tuple[str, ...] = field(default_factory=tuple)


class Decoder(nn.Module):
    """`forward(link, view) -> raw`, `loss(raw, targets) -> {name: LossTerm}`, `predict(raw, ...) -> [Prediction]`.

    `view` is what the decoder `reads`: the trunk's dense features [B, C, H/4, W/4], or `Pixels`.
    """

    name: ClassVar[str]
    family: ClassVar[str]  # of `tasks.LINK_FAMILIES`: the queries that its links come from
    loss_names: ClassVar[tuple[str, ...]]
    reads: ClassVar[Literal["dense", "pixels"]] = "dense"

    def losses(self, link: SuperLink, view: Any, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """A training step. Decoders that put something of the targets into their forward pass (denoising) override
        it."""
        return self.loss(self(link, view), targets)

    def loss(self, raw: Any, targets: PerceptionTargets) -> dict[str, LossTerm]:
        raise NotImplementedError

    def predict(
        self, raw: Any, frames: list[Frame], prompts: list[PromptSpec | None], settings: PredictSettings
    ) -> list[Prediction | None]:
        raise NotImplementedError


@dataclass
class ImageTargets:
    """What G generation or editing prompts should give: `images` uint8 [G, 3, H, W]."""

    images: Tensor

    def to(self, device: torch.device | str) -> ImageTargets:
        return ImageTargets(self.images.to(device))


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn. A prompt's picture depends on `seed` and the prompt, not on what is drawn beside it."""

    steps: int = 30  # of the scheduler
    guidance: float = 7.5
    image_guidance: float = 1.5  # editing only
    seed: int = 0
    size: Size | None = None  # (height, width) in pixels; None: the decoder's own
    num_images: int = 1  # per prompt
    batch_size: int = 4  # pictures drawn at once, to bound memory


class ImageDecoder(nn.Module):
    """A decoder that makes pictures. `link.embeddings`: [G, T, C], the cross-attention input of each prompt."""

    name: ClassVar[str]
    family: ClassVar[str]
    loss_names: ClassVar[tuple[str, ...]]
    reads: ClassVar[Literal["dense", "pixels"]] = "pixels"

    def losses(self, link: SuperLink, view: Pixels, targets: ImageTargets) -> dict[str, LossTerm]:
        """A training step; `view` holds the images that editing starts from, by `link.image_index`."""
        raise NotImplementedError

    def sample(self, link: SuperLink, view: Pixels, settings: SampleSettings) -> Tensor:
        """uint8 [G * num_images, 3, h, w], prompt by prompt."""
        raise NotImplementedError
