"""The training loop of one rank: knows models and batches, not Ray.

Stages follow each other in one process. Each builds its optimizer anew over what it trains; weights go from stage to
stage through memory, or, after a restart, through the newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray.meta_init import on_meta
from lumen_ray.model.build import Generalist, ModelMeta, build_model, save_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.warm_start import StartWeights
from lumen_ray.precision import autocast_context
from lumen_ray.recipe import Recipe, Stage
from lumen_ray.train import lora, parallel, precision
from lumen_ray.train.blocks import checkpoint_blocks, compile_blocks
from lumen_ray.train.ema import Ema
from lumen_ray.train.losses import StepLosses, StepSums
from lumen_ray.train.metrics.metrics import Meter, MetricsLog
from lumen_ray.train.optimizer import build_optimizer, set_lr, set_trainable
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.failures import DivergedError, explained, find_module, resumption, where
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.tokenizer import LumenTokenizer


@dataclass
class Job:
    """Everything a rank needs to train; plain values, so that Ray can ship it."""

    recipe: Recipe
    settings: ModelSettings
    tokenizer: LumenTokenizer
    meta: ModelMeta
    run: str
    init_from: str | None = None  # a model folder whose weights the run starts from


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Makes a CPU step bit-equal however many threads work on it.

    Several threads otherwise add gradients that meet in one element (of a gather or an embedding) in whatever order
    they come. CUDA keeps its own order, which would cost speed to fix.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every tensor here is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def step_seed(seed: int, step: int, rank: int) -> int:
    """What dropout and the like draw from in one step: as long as it follows from the step, a run can be resumed there
    without anything that was drawn before."""
    return int(np.random.SeedSequence((seed, 4, step, rank)).generate_state(1, np.uint64)[0])


def fresh_model(job: Job, resume: Path | None, device: torch.device) -> Generalist:
    """A model as the recipe wants it, with the weights of `resume`, of `init_from`, or fresh ones.

    It is built and sharded without weights, which then go to where they belong one after the other. With LoRA a
    checkpoint leaves out what stays as it was at the start, so a resumed run starts there too.
    """
    recipe = job.recipe
    precision.check(recipe.precision, device)
    with on_meta():
        model = build_model(job.settings, len(job.tokenizer), recipe.seed)
    start = _start_weights(job, model) if resume is None or recipe.lora else None
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


def _start_weights(job: Job, model: Generalist) -> Mapping[str, Tensor]:
    """What a run starts from, by the names of its model without adapters: what `init_from` has, and fresh weights, on
    the first rank alone, for the rest."""
    stored = StartWeights(model, job.init_from) if job.init_from else {}
    drawn = {}
    if parallel.rank() == 0 and (lacking := model.state_dict().keys() - stored.keys()):
        fresh = build_model(job.settings, len(job.tokenizer), job.recipe.seed).state_dict()
        drawn = {name: fresh[name] for name in lacking}
    return ChainMap(drawn, stored)


class Trainer:
    def __init__(self, job: Job, device: torch.device):
        self.job, self.device = job, device
        self.run = Path(job.run)
        self.resume = checkpoint.latest_of_ranks(self.run)
        self.step = checkpoint.start_step(self.resume)
        self.model = fresh_model(job, self.resume, device)
        self.ema = Ema(self.model, job.recipe.ema) if job.recipe.ema else None
        if self.ema and self.resume:
            checkpoint.load_average(self.resume, self.ema.shadow)
        self.meter = Meter(self.model, job.recipe.precision, device)
        self.log = MetricsLog(self.run, self.step, job.recipe) if parallel.rank() == 0 else None

    def fit(self, batches: Iterator[TrainingBatch]) -> None:
        """Runs the recipe from where the newest checkpoint left it. `batches` start at that step (`self.step`)."""
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
        optimizer = build_optimizer(self.model, stage)
        if start:
            checkpoint.load_optimizer(self.resume, self.model, optimizer)
        every = self.job.recipe.checkpoint_every
        for local in range(start, stage.steps):
            asked = time.perf_counter()
            micro_steps = [self._next(batches) for _ in range(stage.accumulate)]
            waited = time.perf_counter() - asked
            with self._explained(self._where(stage, micro_steps)):
                self._step(stage, local, micro_steps, optimizer, waited)
            self.step += 1
            if local + 1 == stage.steps or (every and (local + 1) % every == 0):
                with self._explained(f"saving the checkpoint of step {self.step} (stage {stage.name})"):
                    self._checkpoint(stage, optimizer)

    def _next(self, batches: Iterator[TrainingBatch]) -> TrainingBatch:
        batch = next(batches)
        if batch.step != self.step:
            raise RuntimeError(f"the data gave the batch of step {batch['step']} at step {self.step}")
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
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = parallel.clip_gradients(parameters, stage.grad_clip)
        sums = losses.read()
        bad = [f"loss {name}" for name, value in sums.means.items() if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            self._diverged(stage, micro_steps, ", ".join(bad) or "the gradient")
        optimizer.step()
        if self.ema:
            self.ema.update(self.step)
        if self.log:
            values = self.meter.read(micro_steps, sums, waited, time.perf_counter() - began)
            self._write(stage, micro_steps, sums, {"lr": lr, "grad_norm": round(norm, 5), **values})

    def _gradients(self, stage: Stage, micro_steps: list[TrainingBatch]) -> StepLosses:
        """Forward and backward passes of a step; gradients are added up over ranks in the last."""
        torch.manual_seed(step_seed(self.job.recipe.seed, self.step, parallel.rank()))
        losses = StepLosses(self.model.loss_names, stage.loss_weights, micro_steps, self.device)
        for number, batch in enumerate(micro_steps, 1):
            if len(micro_steps) > 1:
                parallel.reduce_gradients(self.model, number == len(micro_steps))
            with autocast_context(self.job.recipe.precision == "bf16", self.device):
                found = self.model(batch.to(self.device))
            image_tokens = math.prod(self.model.trunk.vision.grid(*batch.images.shape[-2:]))
            losses.add(batch, found, image_tokens).backward()
        return losses

    def _diverged(self, stage: Stage, micro_steps: list[TrainingBatch], what: str) -> None:
        """Ends the run before the weights take the step, on all ranks alike, and says which module it came from."""
        runs = [(lambda batch=batch: self._gradients(stage, [batch]), batch.image_ids) for batch in micro_steps]
        module, image_ids = find_module(self.model, runs)
        raise DivergedError(
            f"{where(self.step, stage.name, image_ids)}: {what} is not finite; the first number that is not finite is "
            f"in {module}; lower the learning rate or leave out the images; {resumption(self.run)}"
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
        for lost in ("branches", "tokens"):  # of samples longer than `pack_tokens`
            if count := sum(batch.truncated.get(lost, 0) for batch in micro_steps):
                values[f"truncated_{lost}"] = count
        self.log.write(self.step, stage.name, values)

    def _checkpoint(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        if self.log:
            self.log.flush()  # first: steps before a checkpoint are not done again
        position = {"step": self.step, "stage": stage.name, "preset": self.job.settings.name}
        checkpoint.save(
            self.run, position, self.model, optimizer, self.job.recipe.keep_checkpoints, self.ema and self.ema.shadow
        )

    def _export(self) -> None:
        """The plain safetensors model folder, from rank 0."""
        recipe = self.job.recipe
        if self.ema and recipe.ema.export:
            self.ema.copy_to_model()
        state = parallel.full_state(self.model)
        if parallel.rank() == 0:
            if recipe.lora:
                if recipe.lora.save_adapters:
                    lora.save_adapters(self.run, state)
                state = lora.plain_state(state, recipe.lora)
            meta = self.job.meta
            meta.recipe, meta.steps, meta.seed = self.job.recipe.name, self.step, self.job.recipe.seed
            save_model(self.run / "model", state, self.job.settings, self.job.tokenizer, meta)
        parallel.barrier()
