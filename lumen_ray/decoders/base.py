"""What every decoder is: forward, loss, predict. One file per decoder owns all three."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from lumen_ray.structures import Prediction, SampleSettings
from lumen_ray.targets import Frame, ImageTargets, PerceptionTargets, Pixels

if TYPE_CHECKING:
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.superlink import SuperLink


class LossTerm(NamedTuple):
    """A loss as a sum and its normaliser, so that the loop can divide by the normaliser of all ranks.

    That makes the loss of a global batch independent of how it is split over processes. A tuple, because FSDP finds
    the tensors it must watch only inside standard containers.
    """

    total: Tensor  # scalar with gradient
    count: Tensor  # scalar without
    each: Tensor | None = None  # detached share of every branch or link in `total`, for the per-task log


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
