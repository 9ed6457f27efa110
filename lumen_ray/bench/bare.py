"""A minimal training loop over batches in memory: no Ray, data loading, logs or checkpoints."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lumen_ray.model.build import Generalist, build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.recipe import Recipe, Stage
from lumen_ray.train import parallel
from lumen_ray.train.optimizer import build_optimizer, set_lr, set_trainable
from lumen_ray.train.run.malloc import keep_freed_memory
from lumen_ray.train.trainer import reproducible
from lumen_ray.trunk.batch import TrainingBatch


@dataclass
class BareRun:
    """The input of a process; plain values. `batches`: file of pickled batches of each rank; `out`: file for rank 0's
    result."""

    recipe: Recipe
    settings: ModelSettings
    vocab_size: int
    threads: int
    batches: list[Path]
    out: Path


def run(job: BareRun) -> tuple[list[float], list[float]]:
    """(time after each step in seconds, loss of each step), in fresh processes: one, or one per rank with FSDP."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(job, rank)) for rank in range(len(job.batches))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"the bare loop ended with {[process.exitcode for process in ranks]}")
    return pickle.loads(job.out.read_bytes())


def _rank(job: BareRun, rank: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(job.threads)
    world_size = len(job.batches)
    if world_size > 1:
        store = job.out.with_suffix(".store")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    batches = [pickle.loads(data) for data in pickle.loads(job.batches[rank].read_bytes())]
    model = build_model(job.settings, job.vocab_size, job.recipe.seed).to(device)
    if world_size > 1:
        model = parallel.shard(model, device, job.recipe.precision)
    result = loop(model, job.recipe.stages[0], batches, device)
    if rank == 0:
        job.out.write_bytes(pickle.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()


def loop(
    model: Generalist, stage: Stage, batches: list[TrainingBatch], device: torch.device
) -> tuple[list[float], list[float]]:
    """Trains one stage; returns (time after each step in seconds, loss of each step)."""
    set_trainable(model, stage)
    model.train()
    optimizer = build_optimizer(model, stage)
    times, losses = [], []
    with reproducible(device):
        for step, batch in enumerate(batches):
            losses.append(_step(model, stage, step, batch, optimizer, device))
            times.append(time.time())
    return times, losses


def _step(
    model: Generalist,
    stage: Stage,
    step: int,
    batch: TrainingBatch,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    set_lr(optimizer, stage, step)
    optimizer.zero_grad(set_to_none=True)
    losses = model(batch.to(device))
    names = [name for name in model.loss_names if name in losses]
    weights = [stage.loss_weights.get(name, 1.0) for name in names]
    sums = torch.stack([losses[name].total.detach() for name in names])
    counts = torch.stack([losses[name].count.detach() for name in names])
    sums, counts = parallel.sum_over_ranks(torch.stack([sums, counts]))
    counts = counts.clamp_min(1.0)
    total = sum(w * losses[name].total / counts[i] for i, (name, w) in enumerate(zip(names, weights, strict=True)))
    (total * parallel.world_size()).backward()
    parallel.clip_gradients([p for group in optimizer.param_groups for p in group["params"]], stage.grad_clip)
    optimizer.step()
    return sum(w * value for w, value in zip(weights, (sums / counts).tolist(), strict=True))
