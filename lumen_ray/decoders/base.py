"""What every decoder is: forward, loss, predict. One file per decoder owns all three."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lumen_ray.structures import Prediction, SampleSettings
from lumen_ray.targets import Frame, ImageTargets, PerceptionTargets, Pixels

if TYPE_CHECKING:
    from lumen_ray.decoders.spec import DecoderSpec, Reads, TrunkShape
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
    """Base of all decoders: a module that learns from super links. A model calls `learn`; subclasses give `losses`."""

    spec: ClassVar[DecoderSpec]
    #: modules that compute in fp32 even where a model answers in bf16, because the rounding would show
    exact: ClassVar[tuple[str, ...]] = ()
    #: prefixes of blocks that stay eager when the others are compiled
    eager: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, settings: Any, shape: TrunkShape) -> Learner:
        """A decoder with fresh weights for its section of a model's settings and the trunk's widths."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The decoder's name in settings and recipes."""
        return self.spec.name

    @property
    def family(self) -> str:
        """The link family (`tasks.LINK_FAMILIES`) whose queries its links come from."""
        return self.spec.family

    @property
    def reads(self) -> Reads:
        """What it reads besides the super link."""
        return self.spec.reads

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Its losses, in a fixed order."""
        return tuple(self.spec.losses)

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

    #: whether a prompt's result depends on that prompt alone; else prompts of a group attend to each other
    independent: ClassVar[bool] = True

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
    """A decoder that makes pictures. `link.embeddings`: [G, T, C], the cross-attention input of each prompt.

    It reads pixels where a picture is edited, else nothing.
    """

    def losses(self, link: SuperLink, view: Pixels | None, targets: ImageTargets) -> dict[str, LossTerm]:
        """A training step; `view` holds the images that editing starts from, by `link.image_index`."""
        raise NotImplementedError

    def sample(self, link: SuperLink, view: Pixels | None, settings: SampleSettings) -> Tensor:
        """uint8 [G * num_images, 3, h, w], prompt by prompt."""
        raise NotImplementedError
