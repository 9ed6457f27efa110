"""The training loop of one rank, independent of Ray.

All stages run in one process. Each builds its own optimizer over the weights it trains; weights pass from stage to
stage in memory or, after a restart, through the newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
from torch import Tensor

from lumen_ray.data.output_folder import OutputFolder
from lumen_ray.model.build import Generalist, ModelMeta, save_model
from lumen_ray.precision import autocast_context
from lumen_ray.recipe import Recipe, Stage
from lumen_ray.train import lora, parallel, precision
from lumen_ray.train.blocks import checkpoint_blocks, compile_blocks
from lumen_ray.train.ema import Ema
from lumen_ray.train.losses import StepLosses, StepSums
from lumen_ray.train.metrics.metrics import Meter, MetricsLog, last_entry
from lumen_ray.train.metrics.profiler import StepProfiler
from lumen_ray.train.metrics.sources import SourceProgress, totals
from lumen_ray.train.new_tokens import RowMask
from lumen_ray.train.optimizer import build_optimizer, set_lr, set_trainable
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.failures import DivergedError, explained, find_module, resumption, where
from lumen_ray.train.run.saver import Saver
from lumen_ray.train.run.start import StartPoint
from lumen_ray.train.validation import Validation, Validator
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.kept import KeptOutputs


@dataclass
class TrainingJob:
    """Everything a rank needs to train except the batches; plain values, so that Ray can ship it."""

    recipe: Recipe
    start: StartPoint
    meta: ModelMeta  # of the model to export
    run: str  # the run folder, an absolute path or a URL
    rows: Mapping[str, int] = field(default_factory=dict)  # of each source of the shards
    validator: Validator | None = None


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Makes a CPU step bit-equal for any number of threads.

    Otherwise threads add gradients of the same element (of a gather or an embedding) in the order in which they arrive.
    CUDA keeps its order, which would cost speed to fix.
    """
    memory: Any = torch.utils.deterministic  # a module whose class has the property, which type checkers miss
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # every tensor here is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout and noise of one step. It depends on the step alone, so a resumed run draws the same."""
    return int(np.random.SeedSequence((seed, 4, step, rank)).generate_state(1, np.uint64)[0])


def sharded_model(job: TrainingJob, resume: str | None, device: torch.device) -> Generalist:
    """Builds the model of a job, sharded over the ranks, with the weights of the checkpoint `resume` or of the start
    point; a collective.

    The model is built and sharded on the meta device, then filled tensor by tensor. With adapters a checkpoint lacks
    the frozen weights, so a resumed run reads those of the start point too.
    """
    recipe = job.recipe
    precision.check(recipe.precision, device)
    model = job.start.build_model()
    start = job.start.weights(model) if resume is None or recipe.lora or model.frozen else None
    if recipe.lora:
        lora.inject(model, recipe.lora, recipe.seed)
    checkpoint_blocks(model, recipe.activation_checkpointing)
    compile_blocks(model, recipe.compile, device)
    model = parallel.shard(model, device, recipe.precision, recipe.shard_group)
    if start is None:
        parallel.materialise(model, device)
    else:
        parallel.fill(model, lambda name: start[lora.plain_name(name)], device)
    if resume is not None:
        checkpoint.load_weights(resume, model)
    return model


class Trainer:
    """Trains one rank from the newest checkpoint of the run folder, or from the job's start point.

    `files`: of the run, if the caller has opened them. `run`: the folder in which this rank writes files, which of a
    run in a bucket are copied there.
    """

    def __init__(self, job: TrainingJob, device: torch.device, files: OutputFolder | None = None):
        self.job, self.device = job, device
        self.files = files or OutputFolder(job.run)
        self.run = self.files.folder
        self.resume = checkpoint.latest_of_ranks(job.run)
        self.step = checkpoint.start_step(self.resume)
        self.model = sharded_model(job, self.resume, device)
        self.ema = Ema(self.model, job.recipe.ema) if job.recipe.ema else None
        if self.ema and self.resume:
            checkpoint.load_average(self.resume, self.ema.shadow)
        self.meter = Meter(self.model, job.recipe.precision, device)
        self.log = MetricsLog(self.run, self.step, job.recipe) if parallel.rank() == 0 else None
        self.saver = Saver(self.files, job.recipe, device)
        self.sources = SourceProgress(job.rows, last_entry(self.run) if self.log else None)
        self.profiler = StepProfiler(self.run, job.recipe, device)
        half = job.recipe.precision == "bf16" and device.type == "cuda"
        self.validation = Validation(job.validator, self.run, job.start, device, half) if job.validator else None
        if self.validation:
            self.validation.begin(self.step, job.run)

    def fit(self, batches: Iterator[TrainingBatch]) -> None:
        """Runs the recipe from step `self.step`, the first of `batches`, to its end, and exports the model."""
        first, local = self.job.recipe.at(self.step)
        with reproducible(self.device):
            for index in range(first, len(self.job.recipe.stages)):
                self._stage(self.job.recipe.stages[index], batches, local)
                local = 0
        self.saver.wait()
        with self._explained("writing the model"):
            self._export()
        if self.log:
            self.log.close()

    @contextmanager
    def _explained(self, place: str) -> Iterator[None]:
        """Explains errors once the save in flight is done, with the checkpoint that it leaves."""
        with explained(place, self.job.run, self.model, self.device):
            try:
                yield
            except Exception:
                self.saver.settle()
                raise

    def _stage(self, stage: Stage, batches: Iterator[TrainingBatch], start: int) -> None:
        set_trainable(self.model, stage)
        self.model.train()
        self.model.trunk.kept = None
        if stage.cache_trunk:
            self.model.trunk.eval()  # what dropout draws would be kept too
            self.model.trunk.kept = KeptOutputs(stage.cache_trunk << 20, partial(parallel.any_rank, self.device))
        optimizer = build_optimizer(self.model, stage)
        self.row_mask = RowMask(self.model)
        if start:
            assert self.resume is not None  # a run without a checkpoint starts at the first step
            checkpoint.load_optimizer(self.resume, self.model, optimizer)
        every = self.job.recipe.checkpoint_every
        for local in range(start, stage.steps):
            with self.profiler.step(self.step):
                values = self._step(stage, local, batches, optimizer)
            if self.validation and self.validation.is_due(self.step + 1, self.job.recipe.total_steps):
                with self._explained(f"validating after step {self.step} (stage {stage.name})"):
                    values |= self._validate()
            if self.log:
                with self._explained(f"step {self.step} (stage {stage.name})"):
                    self.log.write(self.step, stage.name, values)
            self.step += 1
            if local + 1 == stage.steps or (every and (local + 1) % every == 0):
                self._checkpoint(stage, optimizer)

    def _next(self, batches: Iterator[TrainingBatch]) -> TrainingBatch:
        batch = next(batches)
        if batch.step != self.step:
            raise RuntimeError(f"the data gave the batch of step {batch.step} at step {self.step}")
        return batch

    def _step(
        self, stage: Stage, local: int, batches: Iterator[TrainingBatch], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """One optimizer step over this rank's micro-steps; returns the values to log, on rank 0."""
        began = time.perf_counter()
        with self.profiler.span("data"):
            micro_steps = [self._next(batches) for _ in range(stage.accumulate)]
        waited = time.perf_counter() - began
        place = where(self.step, stage.name, [name for batch in micro_steps for name in batch.image_ids])
        with self._explained(place):
            began = time.perf_counter()
            lr = set_lr(optimizer, stage, local)
            optimizer.zero_grad(set_to_none=True)
            losses = self._gradients(stage, micro_steps)
            sums, norm = self._update(stage, micro_steps, losses, optimizer)
            faults = self._faults(micro_steps) if sums.faulty else {}
            if not self.log:
                return {}
            numbers = self.meter.metrics(micro_steps, sums, waited, time.perf_counter() - began)
        values = self._loss_values(stage, sums) | {"lr": lr, "grad_norm": round(norm, 5)}
        return values | numbers | self.sources.add(sums) | faults

    def _update(
        self, stage: Stage, micro_steps: list[TrainingBatch], losses: StepLosses, optimizer: torch.optim.Optimizer
    ) -> tuple[StepSums, float]:
        """Updates weights and average by the gradients of a step; returns its sums and the norm of the gradient."""
        self.row_mask.apply()
        with self.profiler.span("optimizer"):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = parallel.clip_gradients(parameters, stage.grad_clip)
            sums = losses.totals()
            bad = [f"loss {name}" for name, value in sums.means.items() if not math.isfinite(value)]
            if bad or not math.isfinite(norm):
                self._diverged(stage, micro_steps, ", ".join(bad) or "the gradient")
            optimizer.step()
            if self.ema:
                self.ema.update(self.step)
        return sums, norm

    def _gradients(self, stage: Stage, micro_steps: list[TrainingBatch]) -> StepLosses:
        """Forward and backward passes of a step; the last one sums gradients over ranks."""
        torch.manual_seed(step_seed(self.job.recipe.seed, self.step, parallel.rank()))
        sources = tuple(self.job.rows)
        losses = StepLosses(self.model.loss_names, stage.loss_weights, micro_steps, self.device, sources)
        for number, batch in enumerate(micro_steps, 1):
            if len(micro_steps) > 1:
                parallel.reduce_gradients(self.model, number == len(micro_steps))
            with self.profiler.span("forward"), autocast_context(self.job.recipe.precision == "bf16", self.device):
                terms = self.model(batch.to(self.device))
            image_tokens = math.prod(self.model.trunk.vision.grid(*batch.images.shape[-2:]))
            total = losses.add_batch(batch, terms, image_tokens)
            with self.profiler.span("backward"):
                total.backward()
        return losses

    def _diverged(self, stage: Stage, micro_steps: list[TrainingBatch], values: str) -> None:
        """Raises `DivergedError` on all ranks, before the weights are updated, and names the module it came from."""
        self.saver.settle()
        runs = [(partial(self._gradients, stage, [batch]), _named_rows(batch)) for batch in micro_steps]
        module, image_ids = find_module(self.model, runs)
        raise DivergedError(
            f"{where(self.step, stage.name, image_ids)}: {values} is not finite; the first non-finite number is in "
            f"{module}; lower the learning rate or leave out the images; {resumption(self.job.run)}"
        )

    def _faults(self, micro_steps: list[TrainingBatch]) -> dict[str, Any]:
        """Images of a step that could not be read, and numbers of branches and tokens of samples longer than
        `pack_tokens`, of all ranks; a collective."""
        everywhere = parallel.from_all_ranks([(batch.rejected, batch.truncated) for batch in micro_steps])
        of_batches = [faults for of_rank in everywhere for faults in of_rank]
        values: dict[str, Any] = {}
        if rejected := [entry for entries, _ in of_batches for entry in entries]:
            values |= {"rejected_images": len(rejected), "rejected": rejected}
        for unit in ("branches", "tokens"):
            if count := sum(truncated.get(unit, 0) for _, truncated in of_batches):
                values[f"truncated_{unit}"] = count
        return values

    def _loss_values(self, stage: Stage, sums: StepSums) -> dict[str, Any]:
        """The losses of a step to log: in total, by name, by task and by source."""
        weighted = sum(stage.loss_weights.get(n, 1.0) * v for n, v in sums.means.items())
        values = {"loss": round(weighted, 6)} | {f"loss/{name}": round(value, 6) for name, value in sums.means.items()}
        for kind, means in (("task", sums.tasks), ("source", sums.sources)):
            values |= {f"{kind}/{name}": round(value, 5) for name, value in means.items()}
            of_columns = totals(means, stage.loss_weights)
            values |= {f"{kind}_loss/{name}": round(value, 5) for name, value in of_columns.items()}
        return values

    def _validate(self) -> dict[str, float]:
        """Scores the weights that would be exported after this step, and keeps the best; a collective."""
        assert self.validation is not None
        with self._exported() as state:
            state = self._plain(state)
            return self.validation.measure(state, self._meta(self.step + 1))

    def _checkpoint(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        began = time.perf_counter()
        if self.log:
            self.log.flush()  # first: steps before a checkpoint are not repeated
        position = {"step": self.step, "stage": stage.name, "preset": self.job.start.settings.name}
        average = self.ema.shadow if self.ema else None
        self.saver.save(position, self.model, optimizer, average)
        if self.log:
            self.log.saved(self.step, time.perf_counter() - began)

    @contextmanager
    def _exported(self) -> Iterator[dict[str, Tensor]]:
        """A context with the weights to export, on the CPU of rank 0; a collective. They are the model's own tensors
        where it is not sharded."""
        with self.ema.applied() if self.ema and self.ema.settings.export else nullcontext():
            yield parallel.full_state(self.model)

    def _plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Exported weights without adapters."""
        return lora.plain_state(state, self.job.recipe.lora) if self.job.recipe.lora else state

    def _meta(self, steps: int) -> ModelMeta:
        """Metadata of a model after that many steps."""
        return replace(self.job.meta, recipe=self.job.recipe.name, steps=steps, seed=self.job.recipe.seed)

    def _export(self) -> None:
        """Writes the model folder, on rank 0; a collective."""
        recipe, start = self.job.recipe, self.job.start
        with self._exported() as state:
            if parallel.rank() == 0:
                if recipe.lora and recipe.lora.save_adapters:
                    lora.save_adapters(self.run, state)
                weights, meta = self._plain(state), self._meta(self.step)
                save_model(self.run / "model", weights, start.settings, start.tokenizer, meta)
        parallel.barrier()


def _named_rows(batch: TrainingBatch) -> list[str]:
    """The images of a batch with their places in the shards."""
    if not batch.places:
        return batch.image_ids
    return [f"{image_id} ({place})" for image_id, place in zip(batch.image_ids, batch.places, strict=True)]
