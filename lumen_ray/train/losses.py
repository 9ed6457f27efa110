"""The losses of one optimizer step: normalised over all ranks and all micro-steps, reduced in one collective each.

A loss is a sum over its normaliser (`LossTerm`). With one micro-step the normaliser of the global batch is simply the
sum over ranks. With several it is only known when the last one has run, so it is projected: what the batches say
beforehand (supervised tokens, objects, keypoints) of the whole step, times what a unit of that has counted so far in
the step. For tokens and keypoints that is exact, and the gradient is that of the undivided batch. For losses that
count by predicted quality (heatmap, box) or by chosen places (match, mask) it differs as far as micro-steps differ.
"""

from __future__ import annotations

from dataclasses import dataclass

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

#: the fixed list behind the per-task columns, so that all ranks reduce the same ones
TASK_NAMES = tuple(TASKS)
_TASK_INDEX = {name: i for i, name in enumerate(TASK_NAMES)}
_DECODER_OF = {loss: name for name, info in DECODERS.items() for loss in info.losses}


def expected_counts(batch: TrainingBatch, names: tuple[str, ...]) -> Tensor:
    """What a batch says of each loss's normaliser before the forward pass: float [len(names)], 1 where it says nothing.

    A loss that it says nothing of is averaged over the micro-steps.
    """
    known: dict[str, float] = {"lm": float((batch.layout.labels[:, 1:] != IGNORE).sum())}
    targets = batch.targets.get("perception")
    for decoder, info in DECODERS.items():
        if info.family == "perception":
            known |= _objects(decoder, batch, targets) if targets is not None else dict.fromkeys(info.losses, 0.0)
    return torch.tensor([known.get(name, 1.0) for name in names])


def _objects(decoder: str, batch: TrainingBatch, t: PerceptionTargets) -> dict[str, float]:
    """Objects, masks and keypoints of the prompts that the decoder serves, by the losses that count them."""
    served = torch.tensor(served_links(decoder, batch), dtype=torch.int64)
    objects = (t.valid & ~t.crowd & t.counted[:, None])[served]
    counts = {"batches": 1.0, "objects": float(objects.sum())}
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
    """(tokens of pictures and prompts, all tokens the LLM computes: with padding, and with the image tokens of rows
    that have no picture)."""
    layout = batch.layout
    real = int((layout.branch_ids >= 0).sum()) + int(batch.has_image.sum()) * image_tokens
    rows, length = layout.llm_shape(image_tokens)
    return real, rows * length


def per_task(batch: TrainingBatch, losses: dict[str, LossTerm], names: tuple[str, ...], device: torch.device) -> Tensor:
    """Sums and counts by task, [names, 2, tasks], of those losses that say what each prompt gave (`LossTerm.each`).

    Keypoint prompts do not count: what they give is part of their object prompt.
    """
    out = torch.zeros(len(names), 2, len(TASK_NAMES), device=device)
    tasks = torch.tensor([_TASK_INDEX[task] for task in batch.tasks], dtype=torch.int64)
    for row, name in enumerate(names):
        if name not in losses or (each := losses[name].each) is None:
            continue
        index, values = tasks.to(device), each.float()
        if name in _DECODER_OF:
            links, layout = served_links(_DECODER_OF[name], batch), batch.layout
            family = DECODERS[_DECODER_OF[name]].family
            objects = layout.link_parents[family].cpu()[links] < 0
            index = tasks[layout.link_branches[family].cpu()[links]][objects].to(device)
            values = values[objects.to(device)]
        out[row, 0].index_add_(0, index, values)
        out[row, 1].index_add_(0, index, torch.ones_like(values))
    return out


@dataclass(frozen=True)
class StepSums:
    """An optimizer step over all ranks: mean of each loss, mean by task, tokens without and with padding, images.

    `means` leaves out losses that nothing was counted for: those of decoders that the step does not train, and those of
    what none of its images has (masks, keypoints). They are no zeros to be averaged.
    """

    means: dict[str, float]
    tasks: dict[str, float]
    tokens: float
    computed_tokens: float
    images: int


class StepLosses:
    """Adds up the losses of an optimizer step: one `all_reduce` a micro-step, and one before if there are several."""

    def __init__(
        self, names: tuple[str, ...], weights: dict[str, float], batches: list[TrainingBatch], device: torch.device
    ):
        """`batches`: the micro-steps of this rank. A collective where there are several."""
        self.names, self.weights = names, weights
        self.expected = None
        if len(batches) > 1:
            expected = torch.stack([expected_counts(batch, names) for batch in batches])
            self.expected = parallel.sum_over_ranks(expected.to(device))
        self.done = 0
        self._sums: Tensor | None = None

    def add(self, batch: TrainingBatch, losses: dict[str, LossTerm], image_tokens: int = 0) -> Tensor:
        """The scalar of a micro-step to call `backward` on; a collective. `image_tokens`: LLM tokens of one picture.

        FSDP averages gradients over ranks, so the scalar is multiplied by their number: the sum over micro-steps is the
        gradient of the global batch.
        """
        device = losses["lm"].total.device
        zero = torch.zeros((), device=device)
        sums = torch.stack([losses[n].total.detach() if n in losses else zero for n in self.names])
        counts = torch.stack([losses[n].count.detach() if n in losses else zero for n in self.names])
        sizes = (*count_tokens(batch, image_tokens), len(batch.image_ids))
        sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
        tasks = per_task(batch, losses, self.names, device).flatten()
        reduced = parallel.sum_over_ranks(torch.cat([sums, counts, sizes, tasks]))
        self._sums = reduced if self._sums is None else self._sums + reduced
        self.done += 1
        normalisers = self._normalisers()
        total = sum(
            self.weights.get(n, 1.0) * losses[n].total / normalisers[i] for i, n in enumerate(self.names) if n in losses
        )
        return total * parallel.world_size()

    def _normalisers(self) -> Tensor:
        counts = self._sums[len(self.names) : 2 * len(self.names)]
        if self.expected is None:
            return counts.clamp_min(1.0)
        whole, so_far = (part.sum(0) for part in (self.expected, self.expected[: self.done]))
        per_unit = torch.where(so_far > 0, counts / so_far.clamp_min(1.0), torch.ones_like(counts))
        return (per_unit * whole).clamp_min(1.0)

    def read(self) -> StepSums:
        """What the micro-steps so far add up to, over all ranks. Waits for the device, once."""
        n, t = len(self.names), len(TASK_NAMES)
        values = self._sums.tolist()
        # a class loss without objects has a sum and no count; what has neither was not measured by any rank
        measured = {name: i for i, name in enumerate(self.names) if values[i] != 0 or values[n + i] != 0}
        means = {name: values[i] / max(values[n + i], 1.0) for name, i in measured.items()}
        real, computed, images = values[2 * n : 2 * n + 3]
        tasks = {}
        for row, name in enumerate(self.names):
            first = 2 * n + 3 + row * 2 * t
            for i, task in enumerate(TASK_NAMES):
                if count := values[first + t + i]:
                    tasks[f"{name}/{task}"] = values[first + i] / count
        return StepSums(means, tasks, real, computed, int(images))
