"""The interface of decoders: forward, loss, predict, all in one file per decoder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction, SampleSettings, Size
from lumen_ray.targets import Frame, ImageTargets, PerceptionTargets, Pixels

if TYPE_CHECKING:
    from lumen_ray.decoders.spec import DecoderSpec, Reads, TrunkShape
    from lumen_ray.superlink import SuperLink


class LossTerm(NamedTuple):
    """A loss as a sum and its normaliser; the training loop divides by the normaliser summed over all ranks.

    That makes the loss of a global batch independent of how it is split over processes. A tuple, because FSDP registers
    its hooks only on tensors inside standard containers.
    """

    total: Tensor  # scalar with gradient
    count: Tensor  # type: ignore[assignment]  # scalar without gradient; hides tuple.count
    each: Tensor | None = None  # detached share of each branch or link in `total`, for the per-task log


def sum_terms(terms: Sequence[LossTerm], each: Tensor | None = None) -> LossTerm:
    """Adds up totals and counts of at least one term."""
    first, *rest = terms
    total, count = sum((t.total for t in rest), first.total), sum((t.count for t in rest), first.count)
    return LossTerm(total, count, each)


@dataclass(frozen=True)
class PredictSettings:
    """Thresholds of `Decoder.predict`: minimum score, and maximum instances per prompt."""

    score_threshold: float = 0.05
    max_per_phrase: int = 300


@dataclass
class PromptSpec:
    """A prompt as `predict` needs it: its phrase, and the requested outputs."""

    phrase: str
    masks: bool = False
    keypoints: tuple[str, ...] = field(default_factory=tuple)
    sample: SampleSettings | None = None  # of image prompts
    task: str = ""  # by which scores are calibrated

    def nothing(self, size: Size) -> Prediction:
        """The prediction of no object in an image of (height, width) `size`."""
        masks = Masks([], size) if self.masks else None
        keypoints = None
        if self.keypoints:
            keypoints = Keypoints(np.zeros((0, len(self.keypoints), 3), np.float32), self.keypoints, size)
        return Prediction(self.phrase, Boxes([], size), np.zeros(0, np.float32), masks, keypoints)


def anchor(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """Zero, with all trainable parameters in its graph, so that each gets a gradient, possibly zero."""
    return sum(p.sum() for p in parameters if p.requires_grad) * 0.0


class Learner(nn.Module):
    """Base of all decoders: a module trained on super links. A model calls `learn`; subclasses implement `losses`."""

    spec: ClassVar[DecoderSpec]
    #: modules that compute in fp32 even if the model runs in bf16, because the rounding error would be visible
    exact: ClassVar[tuple[str, ...]] = ()
    #: prefixes of blocks that are not compiled
    eager: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, settings: Any, shape: TrunkShape) -> Learner:
        """Builds a decoder with fresh weights from its section of a model's settings and the trunk's widths."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The decoder's name in settings and recipes."""
        return self.spec.name

    @property
    def family(self) -> str:
        """The decoder's link family (`tasks.LINK_FAMILIES`)."""
        return self.spec.family

    @property
    def reads(self) -> Reads:
        """The decoder's input besides the super link."""
        return self.spec.reads

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of its losses, in a fixed order."""
        return tuple(self.spec.losses)

    def losses(self, link: SuperLink, view: Any, targets: Any) -> dict[str, LossTerm]:
        """Losses of a training step, by name."""
        raise NotImplementedError

    def used(self, tasks: Collection[str] | None) -> Iterable[nn.Parameter]:
        """The parameters that prompts of these tasks (None: any) can use."""
        return self.parameters()

    def learn(
        self, link: SuperLink | None, view: Any, targets: Any, zero: Tensor, tasks: Collection[str] | None = None
    ) -> tuple[dict[str, LossTerm], Tensor]:
        """The losses of a training step (none if `link` is None: the batch has no prompt for this decoder), and `zero`
        with all parameters in its graph that `tasks` can use.

        Whether a batch has prompts for a decoder differs between ranks, but under FSDP all ranks must gather the same
        parameters and reduce the same gradients in the same order. Passing `zero`, which depends on the trunk's output,
        through every decoder enforces that.
        """
        losses = {} if link is None else self.losses(link, view, targets)
        if undeclared := losses.keys() - self.spec.losses.keys():
            raise UserError(
                f"decoder '{self.name}' gives losses that its spec does not name: {', '.join(sorted(undeclared))}; add "
                "them to 'losses' with what each counts",
                "broken_decoder",
            )
        return losses, zero + anchor(self.used(tasks))


class Decoder(Learner):
    """`forward(link, view) -> raw`, `loss(raw, targets) -> {name: LossTerm}`, `predict(raw, ...) -> [Prediction]`.

    `view` is the input that the decoder `reads`: the trunk's dense features [B, C, H/4, W/4], or `Pixels`.
    """

    #: whether a prompt's result depends on that prompt alone; otherwise prompts of a group attend to each other
    independent: ClassVar[bool] = True

    def losses(self, link: SuperLink, view: Any, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Losses of a training step. Decoders whose forward pass needs the targets (denoising) override it."""
        return self.loss(self(link, view), targets)

    def loss(self, raw: Any, targets: PerceptionTargets) -> dict[str, LossTerm]:
        """Losses of a forward pass, by name; `targets` has one entry per link."""
        raise NotImplementedError

    def predict(
        self, raw: Any, frames: list[Frame], prompts: list[PromptSpec | None], settings: PredictSettings
    ) -> list[Prediction | None]:
        """One prediction per link, in the frame of the stored image; None for keypoint prompts, whose result is in that
        of their parent. `frames`: one per image; `prompts`: one per link, may be None for keypoint prompts."""
        raise NotImplementedError


class ImageDecoder(Learner):
    """A decoder that generates or edits images. `link.embeddings`: [G, T, C], the cross-attention input of each prompt.

    Its `view` is `Pixels` for editing, else None.
    """

    def losses(self, link: SuperLink, view: Pixels | None, targets: ImageTargets) -> dict[str, LossTerm]:
        """Losses of a training step; `view`: the source images of edits, indexed by `link.image_index`."""
        raise NotImplementedError

    def sample(self, link: SuperLink, view: Pixels | None, settings: SampleSettings) -> Tensor:
        """Generates images uint8 [G * num_images, 3, h, w], prompt by prompt."""
        raise NotImplementedError
