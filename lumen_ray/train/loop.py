"""The training loop of one rank: knows models and batches, not Ray.

Stages follow each other in one process. Each builds its optimizer anew over what it trains; weights go from stage to
stage through memory, or, after a restart, through the newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lumen_ray.model.build import Generalist, ModelMeta, build_model, save_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.tokenizer import LumenTokenizer
from lumen_ray.train import checkpoint, parallel
from lumen_ray.train.metrics import MetricsLog, per_task, reduce_losses
from lumen_ray.train.optimizer import build_optimizer, set_lr, set_trainable
from lumen_ray.train.recipe import Recipe, Stage


@dataclass
class Job:
    """Everything a rank needs to train; plain values, so that Ray can ship it."""

    recipe: Recipe
    settings: ModelSettings
    tokenizer: LumenTokenizer
    meta: ModelMeta
    run: str
    init_from: str | None = None  # a model folder whose weights the run starts from


class DivergedError(RuntimeError):
    """The loss is not a number."""


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


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on the device."""
    moved = dict(batch)
    for name in ("images", "has_image", "layout", "region_masks", "region_images"):
        moved[name] = batch[name].to(device)
    moved["targets"] = {family: targets.to(device) for family, targets in batch["targets"].items()}
    return moved


def fresh_model(job: Job, resume: Path | None, device: torch.device) -> Generalist:
    """A sharded model with the weights of `resume`, of `init_from`, or fresh ones."""
    model = build_model(job.settings, len(job.tokenizer), job.recipe.seed).to(device)
    if resume is None and job.init_from:
        from lumen_ray.model.build import load_model

        model.load_state_dict(load_model(job.init_from, job.settings.name).model.state_dict())
    model = parallel.shard(model, device)
    if resume is not None:
        checkpoint.load_weights(resume, model)
    return model


class Trainer:
    def __init__(self, job: Job, device: torch.device, on_checkpoint: Callable[[Path, dict], None] | None = None):
        self.job, self.device = job, device
        self.run = Path(job.run)
        self.on_checkpoint = on_checkpoint or (lambda path, metrics: None)
        self.resume = checkpoint.latest(self.run)
        self.step = checkpoint.position(self.resume)["step"] if self.resume else 0
        self.model = fresh_model(job, self.resume, device)
        self.log = MetricsLog(self.run, self.step) if parallel.rank() == 0 else None
        self._last: dict[str, Any] = {}

    def fit(self, batches: Iterator[dict[str, Any]]) -> None:
        """Runs the recipe from where the newest checkpoint left it. `batches` start at that step (`self.step`)."""
        first, local = self.job.recipe.at(self.step)
        with reproducible(self.device):
            for index in range(first, len(self.job.recipe.stages)):
                self._stage(self.job.recipe.stages[index], batches, local)
                local = 0
        self._export()
        if self.log:
            self.log.close()

    def _stage(self, stage: Stage, batches: Iterator[dict[str, Any]], start: int) -> None:
        set_trainable(self.model, stage)
        self.model.train()
        optimizer = build_optimizer(self.model, stage)
        if start:
            checkpoint.load_optimizer(self.resume, self.model, optimizer)
        every = self.job.recipe.checkpoint_every
        for local in range(start, stage.steps):
            waited = time.perf_counter()
            batch = next(batches)
            if batch["step"] != self.step:
                raise RuntimeError(f"the data gave the batch of step {batch['step']} at step {self.step}")
            began = time.perf_counter()
            self._step(stage, local, batch, optimizer, began - waited)
            self.step += 1
            if local + 1 == stage.steps or (every and (local + 1) % every == 0):
                self._checkpoint(stage, optimizer)

    def _step(
        self, stage: Stage, local: int, batch: dict[str, Any], optimizer: torch.optim.Optimizer, waited: float
    ) -> None:
        began = time.perf_counter()
        lr = set_lr(optimizer, stage, local)
        losses = self.model(to_device(batch, self.device))
        total, means = reduce_losses(losses, self.model.loss_names, stage.loss_weights)
        if not all(math.isfinite(value) for value in means.values()):
            bad = [name for name, value in means.items() if not math.isfinite(value)]
            raise DivergedError(
                f"step {self.step} (stage {stage.name}): loss {', '.join(bad)} is not finite; images: "
                f"{', '.join(batch['image_ids'][:8])}; lower the learning rate, the last checkpoint is intact"
            )
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = parallel.clip_gradients(parameters, stage.grad_clip)
        optimizer.step()
        if self.log:
            self._write(stage, batch, losses, means, lr, norm, waited, time.perf_counter() - began)

    def _write(self, stage, batch, losses, means, lr, norm, waited, busy) -> None:
        weighted = sum(stage.loss_weights.get(n, 1.0) * v for n, v in means.items())
        seconds = waited + busy
        values = {
            "loss": round(weighted, 6),
            **{f"loss/{name}": round(value, 6) for name, value in means.items()},
            **{f"task/{name}": round(value, 5) for name, value in per_task(batch, losses).items()},
            "lr": lr,
            "grad_norm": round(norm, 5),
            "samples_per_s": round(len(batch["image_ids"]) * parallel.world_size() / seconds, 2),
            "data_wait": round(waited / seconds, 4),
        }
        if batch["rejected"]:
            values["rejected"] = batch["rejected"]
        self.log.write(self.step, stage.name, values)
        self._last = values

    def _checkpoint(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        position = {"step": self.step, "stage": stage.name, "preset": self.job.settings.name}
        path = checkpoint.save(self.run, position, self.model, optimizer)
        self.on_checkpoint(path, {"step": self.step, "stage": stage.name, "loss": self._last.get("loss", 0.0)})

    def _export(self) -> None:
        """The plain safetensors model folder, from rank 0."""
        state = parallel.full_state(self.model)
        if parallel.rank() == 0:
            meta = self.job.meta
            meta.recipe, meta.steps, meta.seed = self.job.recipe.name, self.step, self.job.recipe.seed
            save_model(self.run / "model", state, self.job.settings, self.job.tokenizer, meta)
        parallel.barrier()
