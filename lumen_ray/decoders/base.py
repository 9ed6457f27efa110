"""What every decoder is: forward, loss, predict. One file per decoder owns all three."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lumen_ray.structures import Prediction, Size, as_size


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
class PerceptionTargets:
    """What P perception prompts should find, in input pixels (the frame of `Frame`).

    `boxes` float32 [P, G, 4] xyxy, padded; `valid`, `crowd` bool [P, G]; `mask_index` int64 [P, G] into `masks`
    uint8 [M, H/4, W/4] or -1; `keypoints` float32 [P, G, 3], for keypoint prompts: the keypoint in each instance of
    the parent prompt (v = 0 where unlabelled). `counted` bool [P]: False for prompts without detection targets.
    """

    boxes: Tensor
    valid: Tensor
    crowd: Tensor
    mask_index: Tensor
    masks: Tensor
    keypoints: Tensor
    counted: Tensor

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
    """`forward(link, dense) -> raw`, `loss(raw, targets) -> {name: LossTerm}`, `predict(raw, ...) -> [Prediction]`."""

    family: ClassVar[str]
    loss_names: ClassVar[tuple[str, ...]]

    def loss(self, raw: Any, targets: PerceptionTargets) -> dict[str, LossTerm]:
        raise NotImplementedError

    def predict(
        self, raw: Any, frames: list[Frame], prompts: list[PromptSpec | None], settings: PredictSettings
    ) -> list[Prediction | None]:
        raise NotImplementedError
