"""The losses of one optimizer step, normalised over all ranks and micro-steps, with one collective per micro-step.

A loss is a sum divided by a normaliser (`LossTerm`). With one micro-step the normaliser of the global batch is the sum
over ranks. With several it is known only after the last one, so it is projected: the units that the batches of the step
hold (supervised tokens, objects, keypoints; known beforehand), times the normaliser per unit so far. For tokens and
keypoints the projection is exact, and the gradient equals that of the undivided batch. For losses normalised by
predicted quality or by assigned places it is as accurate as the micro-steps are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lumen_ray.decoders.base import LossTerm
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.model.build import served_links
from lumen_ray.targets import PerceptionTargets
from lumen_ray.tasks import TASKS
from lumen_ray.train import parallel
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.layout import IGNORE

#: the per-task columns, in a fixed order, so that all ranks reduce the same ones
TASK_NAMES = tuple(TASKS)
_TASK_INDEX = {name: i for i, name in enumerate(TASK_NAMES)}
_DECODER_OF = {loss: name for name, info in DECODERS.items() for loss in info.losses}


def expected_counts(batch: TrainingBatch, names: tuple[str, ...]) -> Tensor:
    """The units in a batch that each loss is normalised by, known before the forward pass: float [len(names)].

    1 for a loss without such a unit: it is averaged over the micro-steps.
    """
    known: dict[str, float] = {"lm": float((batch.layout.labels[:, 1:] != IGNORE).sum())}
    targets = batch.targets.get("perception")
    for decoder, info in DECODERS.items():
        if info.family == "perception":
            assert targets is None or isinstance(targets, PerceptionTargets)
            known |= dict.fromkeys(info.losses, 0.0) if targets is None else _objects(decoder, batch, targets)
    return torch.tensor([known.get(name, 1.0) for name in names])


def _objects(decoder: str, batch: TrainingBatch, t: PerceptionTargets) -> dict[str, float]:
    """Numbers of objects, masks or keypoints in the prompts that the decoder serves, by the loss that counts them."""
    served = torch.tensor(served_links(decoder, batch), dtype=torch.int64)
    objects = (t.valid & ~t.crowd & t.counted[:, None])[served]
    prompts = float(t.counted[served].sum())
    counts = {"batches": 1.0, "objects": float(objects.sum()), "prompts": prompts}
    units = set(DECODERS[decoder].losses.values())
    if "masks" in units:
        counts["masks"] = float((objects & (t.mask_index[served] >= 0)).sum())
    if "keypoints" in units:
        parents = batch.layout.link_parents["perception"]
        children = torch.nonzero(parents >= 0).flatten()
        shown = (t.valid & ~t.crowd)[parents[children]]
        counts["keypoints"] = float((shown & (t.keypoints[children][..., 2] > 0)).sum())
    return {loss: counts[unit] for loss, unit in DECODERS[decoder].losses.items()}


def count_tokens(batch: TrainingBatch, image_tokens: int) -> tuple[int, int]:
    """(tokens of images and prompts, tokens the LLM computes: also padding, and the image tokens of rows without an
    image, or with fewer than others)."""
    layout = batch.layout
    images = int(batch.has_image.sum()) + len(batch.further_rows)
    real = int((layout.branch_ids >= 0).sum()) + images * image_tokens
    rows, length = layout.llm_shape(image_tokens * batch.most_images)
    return real, rows * length


def per_task(batch: TrainingBatch, losses: dict[str, LossTerm], names: tuple[str, ...], device: torch.device) -> Tensor:
    """Sums and counts by task, float32 [names, 2, tasks], of the losses with a value per prompt (`LossTerm.each`).

    Keypoint prompts are not counted: their losses are in those of their object prompt.
    """
    of_branches = torch.tensor([_TASK_INDEX[task] for task in batch.tasks], dtype=torch.int64)

    def of_links(family: str) -> Tensor:
        return torch.tensor([_TASK_INDEX[task] for task in batch.layout.link_tasks(family, batch.tasks)])

    return _by_column(batch, losses, names, of_branches, of_links, len(TASK_NAMES), device)


def per_source(
    batch: TrainingBatch,
    losses: dict[str, LossTerm],
    names: tuple[str, ...],
    sources: tuple[str, ...],
    device: torch.device,
) -> Tensor:
    """`per_task` by the source of each prompt's image or text, float32 [names, 2, sources]."""
    index = {name: i for i, name in enumerate(sources)}
    of_rows = torch.tensor([index[name] for name in batch.sources], dtype=torch.int64)
    of_branches = of_rows[batch.layout.last_slots[:, 0]]

    def of_links(family: str) -> Tensor:
        return of_branches[batch.layout.link_branches[family]]

    return _by_column(batch, losses, names, of_branches, of_links, len(sources), device)


def _by_column(
    batch: TrainingBatch,
    losses: dict[str, LossTerm],
    names: tuple[str, ...],
    of_branches: Tensor,
    of_links: Callable[[str], Tensor],
    columns: int,
    device: torch.device,
) -> Tensor:
    """Sums and counts, float32 [names, 2, columns], of the losses with a value per prompt.

    of_branches: int64 [branches], the column of each prompt; of_links: the same for the links of a family.
    """
    out = torch.zeros(len(names), 2, columns, device=device)
    for row, name in enumerate(names):
        if name not in losses or (each := losses[name].each) is None:
            continue
        index, values = of_branches.to(device), each.float()
        if name == "lm":  # prompts of words alone have no text to learn
            learned = batch.layout.branch_ids[batch.layout.labels != IGNORE].unique().to(device)
            index, values = index[learned], values[learned]
        if name in _DECODER_OF:
            links, layout = served_links(_DECODER_OF[name], batch), batch.layout
            family = DECODERS[_DECODER_OF[name]].family
            objects = layout.link_parents[family].cpu()[links] < 0
            index = of_links(family)[links][objects].to(device)
            values = values[objects.to(device)]
        out[row, 0].index_add_(0, index, values)
        out[row, 1].index_add_(0, index, torch.ones_like(values))
    return out


@dataclass(frozen=True)
class StepSums:
    """An optimizer step over all ranks: mean of each loss, mean by task, tokens without and with padding, samples; mean
    by source, where there are several, and samples of each; images rejected and prompts or tokens cut off.

    `means` lacks losses that no rank measured: those of decoders that the step does not train, and those of annotations
    that none of its images has (masks, keypoints). They must not be averaged as zeros.
    """

    means: dict[str, float]
    tasks: dict[str, float]
    tokens: float
    computed_tokens: float
    images: int
    sources: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    faulty: int = 0


class StepLosses:
    """Sums the losses of an optimizer step: one `all_reduce` per micro-step, and one before if there are several."""

    def __init__(
        self,
        names: tuple[str, ...],
        weights: dict[str, float],
        batches: list[TrainingBatch],
        device: torch.device,
        sources: tuple[str, ...] = (),
    ):
        """`batches`: the micro-steps of this rank. A collective if there are several. `sources`: of the shards, the
        same on all ranks; empty: losses are not told apart by them."""
        self.names, self.weights, self.sources = names, weights, sources
        self.expected: Tensor | None = None
        if len(batches) > 1:
            expected = torch.stack([expected_counts(batch, names) for batch in batches])
            self.expected = parallel.sum_over_ranks(expected.to(device))
        self.done = 0
        self._sums: Tensor | None = None

    def add_batch(self, batch: TrainingBatch, losses: dict[str, LossTerm], image_tokens: int = 0) -> Tensor:
        """Adds a micro-step; a collective. Returns the scalar to call `backward` on. `image_tokens`: LLM tokens of one
        image.

        FSDP averages gradients over ranks, so the scalar is multiplied by their number: the gradients of all
        micro-steps add up to that of the global batch.
        """
        device = losses["lm"].total.device
        zero = torch.zeros((), device=device)
        sums = torch.stack([losses[n].total.detach() if n in losses else zero for n in self.names])
        counts = torch.stack([losses[n].count.detach() if n in losses else zero for n in self.names])
        faulty = len(batch.rejected) + sum(batch.truncated.values())
        numbers = (*count_tokens(batch, image_tokens), len(batch.image_ids), faulty)
        samples = [batch.sources.count(name) for name in self.sources]
        sizes = torch.tensor([*numbers, *samples], dtype=torch.float32, device=device)
        parts = [sums, counts, sizes, per_task(batch, losses, self.names, device).flatten()]
        if len(self.sources) > 1:
            parts.append(per_source(batch, losses, self.names, self.sources, device).flatten())
        reduced = parallel.sum_over_ranks(torch.cat(parts))
        self._sums = reduced if self._sums is None else self._sums + reduced
        self.done += 1
        normalisers = self._normalisers(self._sums)
        total = sum(
            (self.weights.get(n, 1.0) * losses[n].total / normalisers[i])
            for i, n in enumerate(self.names)
            if n in losses
        )
        assert isinstance(total, Tensor)  # "lm" is always there
        return total * parallel.world_size()

    def _normalisers(self, sums: Tensor) -> Tensor:
        """Of the whole step, float32 [names], from the `sums` of the micro-steps so far."""
        counts = sums[len(self.names) : 2 * len(self.names)]
        if self.expected is None:
            return counts.clamp_min(1.0)
        whole, so_far = self.expected.sum(0), self.expected[: self.done].sum(0)
        per_unit = torch.where(so_far > 0, counts / so_far.clamp_min(1.0), torch.ones_like(counts))
        return (per_unit * whole).clamp_min(1.0)

    def totals(self) -> StepSums:
        """The sums over all ranks and the micro-steps so far, at least one. Waits for the device, once."""
        assert self._sums is not None
        n, s = len(self.names), len(self.sources)
        values = self._sums.tolist()
        # a class loss without objects has a sum and no count; a loss with neither was not measured by any rank
        measured = {name: i for i, name in enumerate(self.names) if values[i] != 0 or values[n + i] != 0}
        means = {name: values[i] / max(values[n + i], 1.0) for name, i in measured.items()}
        real, computed, images, faulty = values[2 * n : 2 * n + 4]
        samples = dict(zip(self.sources, map(int, values[2 * n + 4 :]), strict=False))
        by_prompt = values[2 * n + 4 + s :]
        tasks, end = self._means_by(TASK_NAMES, by_prompt), 2 * n * len(TASK_NAMES)
        sources = self._means_by(self.sources, by_prompt[end:]) if s > 1 else {}
        return StepSums(means, tasks, real, computed, int(images), sources, samples, int(faulty))

    def _means_by(self, columns: tuple[str, ...], values: list[float]) -> dict[str, float]:
        """{"loss/column": mean} of `values`, a flattened [names, 2, columns] of sums and counts."""
        found, width = {}, len(columns)
        for row, name in enumerate(self.names):
            first = row * 2 * width
            for i, column in enumerate(columns):
                if count := values[first + width + i]:
                    found[f"{name}/{column}"] = values[first + i] / count
        return found
