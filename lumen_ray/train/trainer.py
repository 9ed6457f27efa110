"""The training loop of one rank, independent of Ray.

All stages run in one process. Each builds its own optimizer over the weights it trains; weights pass from stage to
stage in memory or, after a restart, through the newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic

from lumen_ray.model.build import Generalist, ModelMeta, save_model
from lumen_ray.precision import autocast_context
from lumen_ray.recipe import Recipe, Stage
from lumen_ray.train import lora, parallel, precision
from lumen_ray.train.blocks import checkpoint_blocks, compile_blocks
from lumen_ray.train.ema import Ema
from lumen_ray.train.losses import StepLosses, StepSums
from lumen_ray.train.metrics.metrics import Meter, MetricsLog
from lumen_ray.train.new_tokens import RowMask
from lumen_ray.train.optimizer import build_optimizer, set_lr, set_trainable
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.failures import DivergedError, explained, find_module, resumption, where
from lumen_ray.train.run.start import StartPoint
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.kept import KeptOutputs


@dataclass
class TrainingJob:
    """Everything a rank needs to train except the batches; plain values, so that Ray can ship it."""

    recipe: Recipe
    start: StartPoint
    meta: ModelMeta  # of the model to export
    run: str  # the run folder


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


def sharded_model(job: TrainingJob, resume: Path | None, device: torch.device) -> Generalist:
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
    model = parallel.shard(model, device, recipe.precision)
    if start is None:
        parallel.materialise(model, device)
    else:
        parallel.fill(model, lambda name: start[lora.plain_name(name)], device)
    if resume is not None:
        checkpoint.load_weights(resume, model)
    return model


class Trainer:
    """Trains one rank from the newest checkpoint of the run folder, or from the job's start point."""

    def __init__(self, job: TrainingJob, device: torch.device):
        self.job, self.device = job, device
        self.run = Path(job.run)
        self.resume = checkpoint.latest_of_ranks(self.run)
        self.step = checkpoint.start_step(self.resume)
        self.model = sharded_model(job, self.resume, device)
        self.ema = Ema(self.model, job.recipe.ema) if job.recipe.ema else None
        if self.ema and self.resume:
            checkpoint.load_average(self.resume, self.ema.shadow)
        self.meter = Meter(self.model, job.recipe.precision, device)
        self.log = MetricsLog(self.run, self.step, job.recipe) if parallel.rank() == 0 else None

    def fit(self, batches: Iterator[TrainingBatch]) -> None:
        """Runs the recipe from step `self.step`, the first of `batches`, to its end, and exports the model."""
        first, local = self.job.recipe.at(self.step)
        with reproducible(self.device):
            for index in range(first, len(self.job.recipe.stages)):
                self._stage(self.job.recipe.stages[index], batches, local)
                local = 0
        with self._explained("writing the model"):
            self._export()
        if self.log:
            self.log.close()

    def _explained(self, place: str) -> AbstractContextManager[None]:
        return explained(place, self.run, self.model, self.device)

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
            began = time.perf_counter()
            micro_steps = [self._next(batches) for _ in range(stage.accumulate)]
            waited = time.perf_counter() - began
            with self._explained(self._where(stage, micro_steps)):
                self._step(stage, local, micro_steps, optimizer, waited)
            self.step += 1
            if local + 1 == stage.steps or (every and (local + 1) % every == 0):
                with self._explained(f"saving the checkpoint of step {self.step} (stage {stage.name})"):
                    self._checkpoint(stage, optimizer)

    def _next(self, batches: Iterator[TrainingBatch]) -> TrainingBatch:
        batch = next(batches)
        if batch.step != self.step:
            raise RuntimeError(f"the data gave the batch of step {batch.step} at step {self.step}")
        return batch

    def _where(self, stage: Stage, micro_steps: list[TrainingBatch]) -> str:
        return where(self.step, stage.name, [name for batch in micro_steps for name in batch.image_ids])

    def _step(
        self,
        stage: Stage,
        local: int,
        micro_steps: list[TrainingBatch],
        optimizer: torch.optim.Optimizer,
        waited: float,
    ) -> None:
        """One optimizer step over this rank's micro-steps."""
        began = time.perf_counter()
        lr = set_lr(optimizer, stage, local)
        optimizer.zero_grad(set_to_none=True)
        losses = self._gradients(stage, micro_steps)
        self.row_mask.apply()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = parallel.clip_gradients(parameters, stage.grad_clip)
        sums = losses.totals()
        bad = [f"loss {name}" for name, value in sums.means.items() if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            self._diverged(stage, micro_steps, ", ".join(bad) or "the gradient")
        optimizer.step()
        if self.ema:
            self.ema.update(self.step)
        if self.log:
            values = self.meter.metrics(micro_steps, sums, waited, time.perf_counter() - began)
            self._write(stage, micro_steps, sums, {"lr": lr, "grad_norm": round(norm, 5), **values})

    def _gradients(self, stage: Stage, micro_steps: list[TrainingBatch]) -> StepLosses:
        """Forward and backward passes of a step; the last one sums gradients over ranks."""
        torch.manual_seed(step_seed(self.job.recipe.seed, self.step, parallel.rank()))
        losses = StepLosses(self.model.loss_names, stage.loss_weights, micro_steps, self.device)
        for number, batch in enumerate(micro_steps, 1):
            if len(micro_steps) > 1:
                parallel.reduce_gradients(self.model, number == len(micro_steps))
            with autocast_context(self.job.recipe.precision == "bf16", self.device):
                terms = self.model(batch.to(self.device))
            image_tokens = math.prod(self.model.trunk.vision.grid(*batch.images.shape[-2:]))
            losses.add_batch(batch, terms, image_tokens).backward()
        return losses

    def _diverged(self, stage: Stage, micro_steps: list[TrainingBatch], values: str) -> None:
        """Raises `DivergedError` on all ranks, before the weights are updated, and names the module it came from."""
        runs = [(partial(self._gradients, stage, [batch]), batch.image_ids) for batch in micro_steps]
        module, image_ids = find_module(self.model, runs)
        raise DivergedError(
            f"{where(self.step, stage.name, image_ids)}: {values} is not finite; the first non-finite number is in "
            f"{module}; lower the learning rate or leave out the images; {resumption(self.run)}"
        )

    def _write(self, stage: Stage, micro_steps: list[TrainingBatch], sums: StepSums, numbers: dict[str, Any]) -> None:
        weighted = sum(stage.loss_weights.get(n, 1.0) * v for n, v in sums.means.items())
        values = {
            "loss": round(weighted, 6),
            **{f"loss/{name}": round(value, 6) for name, value in sums.means.items()},
            **{f"task/{name}": round(value, 5) for name, value in sums.tasks.items()},
            **numbers,
        }
        if rejected := [entry for batch in micro_steps for entry in batch.rejected]:
            values["rejected"] = rejected
        for unit in ("branches", "tokens"):  # of samples longer than `pack_tokens`
            if count := sum(batch.truncated.get(unit, 0) for batch in micro_steps):
                values[f"truncated_{unit}"] = count
        assert self.log is not None
        self.log.write(self.step, stage.name, values)

    def _checkpoint(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        if self.log:
            self.log.flush()  # first: steps before a checkpoint are not repeated
        position = {"step": self.step, "stage": stage.name, "preset": self.job.start.settings.name}
        average = self.ema.shadow if self.ema else None
        checkpoint.save(self.run, position, self.model, optimizer, self.job.recipe.keep_checkpoints, average)

    def _export(self) -> None:
        """Writes the model folder, on rank 0; a collective."""
        recipe, start = self.job.recipe, self.job.start
        if self.ema and self.ema.settings.export:
            self.ema.copy_to_model()
        state = parallel.full_state(self.model)
        if parallel.rank() == 0:
            if recipe.lora:
                if recipe.lora.save_adapters:
                    lora.save_adapters(self.run, state)
                state = lora.plain_state(state, recipe.lora)
            meta = replace(self.job.meta, recipe=recipe.name, steps=self.step, seed=recipe.seed)
            save_model(self.run / "model", state, start.settings, start.tokenizer, meta)
        parallel.barrier()
