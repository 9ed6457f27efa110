"""What every decoder is: forward, loss, predict. One file per decoder owns all three."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.keypoints import DEFAULT_SIGMA
from lumen_ray.structures import Prediction, SampleSettings, Size, as_size

if TYPE_CHECKING:
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.model.superlink import SuperLink


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the model input: scaled by `scale`, at the top left, padded to `input_size`."""

    size: Size  # (height, width) of the EXIF-rotated image, pixels
    scale: float
    input_size: Size

    @property
    def extent(self) -> Size:
        """(height, width) of the image in the input, in whole pixels; the rest is padding."""
        return tuple(
            min(side, max(1, math.ceil(own * self.scale))) for own, side in zip(self.size, self.input_size, strict=True)
        )

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

    `images` uint8 [B, 3, H, W], the trunk's input or images in the decoder's own size; `extents` int64 [B, 2]: (height,
    width) of the part at the top left that shows the image, the rest is padding.
    """

    images: Tensor
    extents: Tensor

    def to(self, device: torch.device | str) -> Pixels:
        return Pixels(self.images.to(device), self.extents.to(device))

    @classmethod
    def stack(cls, images: Sequence[Tensor], extents: Sequence[Size] | None = None) -> Pixels:
        """Images uint8 [3, h, w] of any sizes, padded to the largest; `extents`: (height, width) of the part of each
        that is not padding, by default all of it."""
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

    def only(self, members: Tensor) -> PerceptionTargets:
        """Those of the prompts at `members`, int64 [M]."""
        per_prompt = {name: value[members] for name, value in self.__dict__.items() if name != "masks"}
        return PerceptionTargets(masks=self.masks, **per_prompt)


@dataclass(frozen=True)
class PredictSettings:
    score_threshold: float = 0.05
    max_per_phrase: int = 300


@dataclass
class PromptSpec:
    """How the predictions of one link become part of an answer: its phrase, and what is asked for."""

    phrase: str
    masks: bool = False
    keypoints: tuple[str, ...] = field(default_factory=tuple)
    sample: SampleSettings | None = None  # of prompts that ask for pictures


def anchor(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """Zero, with those of the parameters that learn in its graph: a step gives each a gradient, were it zero."""
    return sum(p.sum() for p in parameters if p.requires_grad) * 0.0


class Learner(nn.Module):
    """What learns from super links. `losses` is its own; `learn` is how a model calls it."""

    #: modules whose arithmetic is fp32 also where a model answers in bf16, whose rounding would show
    exact: ClassVar[tuple[str, ...]] = ()

    def losses(self, link: SuperLink, view: Any, targets: Any) -> dict[str, LossTerm]:
        raise NotImplementedError

    def used(self, tasks: Collection[str] | None) -> Iterable[nn.Parameter]:
        """The weights that prompts of these tasks (None: any) can use."""
        return self.parameters()

    def learn(
        self, link: SuperLink | None, view: Any, targets: Any, zero: Tensor, tasks: Collection[str] | None = None
    ) -> tuple[dict[str, LossTerm], Tensor]:
        """The losses of a training step, none where nothing is asked (`link` is None), and `zero` with all weights in
        its graph that learn from these tasks.

        Whether a batch asks anything differs from rank to rank. All must gather the same weights and reduce the same
        gradients, in the same order: for that `zero`, which comes from what the link does, passes through.
        """
        found = {} if link is None else self.losses(link, view, targets)
        return found, zero + anchor(self.used(tasks))


class Decoder(Learner):
    """`forward(link, view) -> raw`, `loss(raw, targets) -> {name: LossTerm}`, `predict(raw, ...) -> [Prediction]`.

    `view` is what the decoder `reads`: the trunk's dense features [B, C, H/4, W/4], or `Pixels`.
    """

    name: ClassVar[str]
    family: ClassVar[str]  # of `tasks.LINK_FAMILIES`: the queries that its links come from
    loss_names: ClassVar[tuple[str, ...]]
    reads: ClassVar[Literal["dense", "pixels"]] = "dense"
    #: whether each prompt is looked at by itself; else those of a group see each other
    independent: ClassVar[bool] = True

    @classmethod
    def build(cls, settings: ModelSettings) -> Decoder:
        """The decoder of a model with these settings, with fresh weights."""
        raise NotImplementedError

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
    """What G generation or editing prompts should give: `images` uint8 [G, 3, H, W], in the size they are learned in.

    `extents` int64 [G, 2], as in `Pixels`: the part at the top left that counts, of a (height, width) that the decoder
    can draw; None: all of each image. An edit's target lies in the same frame as the image it starts from.
    `caption_ids` int64 [G, L]: each picture's description, or the instruction of an edit, in the ids of the CLIP text
    encoder's tokenizer; None where the model has no such tokenizer.
    """

    images: Tensor
    extents: Tensor | None = None
    caption_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> ImageTargets:
        return ImageTargets(*(None if value is None else value.to(device) for value in self.__dict__.values()))

    def only(self, members: Tensor) -> ImageTargets:
        """Those of the prompts at `members`, int64 [M]."""
        return ImageTargets(*(None if value is None else value[members] for value in self.__dict__.values()))


class ImageDecoder(Learner):
    """A decoder that makes pictures. `link.embeddings`: [G, T, C], the cross-attention input of each prompt."""

    name: ClassVar[str]
    family: ClassVar[str]
    loss_names: ClassVar[tuple[str, ...]]
    reads: ClassVar[Literal["pixels"] | None]  # the picture that is to be edited, or nothing

    @classmethod
    def build(cls, settings: ModelSettings) -> ImageDecoder:
        """The decoder of a model with these settings, with fresh weights."""
        raise NotImplementedError

    def losses(self, link: SuperLink, view: Pixels | None, targets: ImageTargets) -> dict[str, LossTerm]:
        """A training step; `view` holds the images that editing starts from, by `link.image_index`."""
        raise NotImplementedError

    def sample(self, link: SuperLink, view: Pixels | None, settings: SampleSettings) -> Tensor:
        """uint8 [G * num_images, 3, h, w], prompt by prompt."""
        raise NotImplementedError
