"""Ray Train runs the loop: workers, process group, restarts; Ray Data feeds each rank its own plan. No math here.

A data set split over ranks promises no order, so it cannot give the same samples again after a restart. Instead each
rank gets a data set made from its own part of the plan, built anew at every start of the worker group from the newest
checkpoint; the loop checks that every batch is the one of its step.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lumen_ray import config
from lumen_ray.data.feed import (
    READ_CPUS,
    BatchReader,
    dataset_for_rank,
    local_batches,
    plan_items,
    ray_batches,
    read_texts,
    skeletons_of,
)
from lumen_ray.data.mixture import Plan
from lumen_ray.data.shards import read_manifest
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, load_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.tokenizer import LumenTokenizer
from lumen_ray.presets import model_path
from lumen_ray.train import checkpoint
from lumen_ray.train.loop import Job, Trainer
from lumen_ray.train.memory import keep_freed_memory
from lumen_ray.train.metrics import MetricsWatcher, Progress, drop_from
from lumen_ray.train.recipe import Recipe
from lumen_ray.train.run_folder import forget_failure, keep_start, raise_failure, run_once, start_of, told

WORKER_CPUS = 0.5  # logical CPUs of a worker: with READ_CPUS below one, so that a rank fits on every core


@dataclass
class Prepared:
    job: Job
    reader: BatchReader
    manifest: dict[str, Any]


def prepare_job(shards: str | Path, recipe: Recipe, run: str | Path, init_from: str | None = None) -> Prepared:
    """Checks everything that can be wrong before a worker starts; trains the tokenizer on the shards' text.

    A run folder keeps what it was started with: continuing it with anything else is a `UserError`.
    """
    init_from = str(Path(init_from).absolute()) if init_from else None
    run = Path(run).absolute()
    manifest = read_manifest(shards)
    settings = config.load(ModelSettings, model_path(recipe.model))
    newest = checkpoint.latest(run)
    if newest:
        checkpoint.check_preset(newest, settings.name)
    keep_start(run, start_of(recipe, settings, manifest, init_from), resumes=newest is not None)
    tokenizer_file = run / "tokenizer.json"
    if init_from:
        tokenizer = load_model(init_from, settings.name).tokenizer
    elif newest and tokenizer_file.is_file():
        tokenizer = LumenTokenizer.load(tokenizer_file)
    else:
        tokenizer = LumenTokenizer.train(read_texts(shards), settings.vocab_size)
    tokenizer.save(tokenizer_file)
    skeletons = skeletons_of(manifest)
    meta = ModelMeta(
        preset=settings.name,
        classes=[c["name"] for c in manifest["categories"] if not c.get("supercategory_only")],
        skeletons={name: list(points) for name, points in skeletons.items()},
        edges={c["name"]: c.get("skeleton") or [] for c in manifest["categories"] if c.get("keypoints")},
    )
    job = Job(recipe, settings, tokenizer, meta, str(run), init_from)
    reader = BatchReader(str(Path(shards).absolute()), recipe, tokenizer, settings.image_size, skeletons)
    return Prepared(job, reader, manifest)


def train_local(prepared: Prepared, device: str = "cpu") -> Path:
    """The same run in this process, without Ray: one rank, batches read in line. Returns the model folder."""
    plan = Plan(prepared.manifest, prepared.job.recipe)
    trainer = Trainer(prepared.job, torch.device(device))
    trainer.fit(local_batches(prepared.reader, plan, trainer.step))
    return trainer.run / "model"


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train
    from ray.train import CheckpointUploadMode

    keep_freed_memory()
    torch.set_num_threads(config["threads"])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def publish(path: Path, metrics: dict[str, Any]) -> None:
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(path),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def fit() -> None:
        trainer = Trainer(config["job"], device, publish)
        trainer.fit(ray_batches(ray.train.get_dataset_shard("train")))

    run_once(Path(config["job"].run), fit)


def train(
    shards: str | Path,
    recipe: Recipe,
    run: str | Path,
    *,
    init_from: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Runs a recipe on Ray, resuming `run` where its newest checkpoint left it; returns the model folder.

    `progress` gets every line of `metrics.jsonl` as it is written. Raises `UserError` for what the user must change.
    """
    prepared = prepare_job(shards, recipe, run, init_from)
    Plan(prepared.manifest, recipe, recipe.workers)  # wrong batch sizes are told before workers start
    run = Path(prepared.job.run)
    newest = checkpoint.latest(run)
    start = checkpoint.position(newest)["step"] if newest else 0
    if start == recipe.total_steps:
        if not (run / "model" / "model.safetensors").is_file():  # killed between the last checkpoint and the export
            Trainer(prepared.job, torch.device("cpu")).fit(iter(()))
        return run / "model"
    drop_from(run / "metrics.jsonl", start)  # before the watcher, which would take old lines for new ones
    watcher = MetricsWatcher(run / "metrics.jsonl", start, progress) if progress else None
    try:
        _fit(prepared, run)
    finally:
        if watcher:
            watcher.stop()
    return run / "model"


def _fit(prepared: Prepared, run: Path) -> None:
    from lumen_ray.ray_env import init_local

    init_local()
    import ray
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = prepared.job.recipe
    _check_cpus(ray.cluster_resources().get("CPU", 0), recipe.workers)
    forget_failure(run)

    class PlanConfig(DataConfig):
        """Every rank's own data set, in plan order, from the position of the newest checkpoint.

        `streaming_split(1)` keeps the order (one consumer, a queue) and moves the executor into an actor: as a thread
        of the worker it would take the interpreter lock from the training step, which then ran at half speed.
        """

        def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
            newest = checkpoint.latest(run)
            start = checkpoint.position(newest)["step"] if newest else 0
            plan = Plan(prepared.manifest, recipe, world_size)
            return [
                {
                    "train": dataset_for_rank(prepared.reader, plan_items(plan, r, world_size, start)).streaming_split(
                        1
                    )[0]
                }
                for r in range(world_size)
            ]

    gpu = torch.cuda.is_available()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": prepared.job, "threads": max(1, (os.cpu_count() or 1) // recipe.workers)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.workers, use_gpu=gpu, resources_per_worker={"CPU": WORKER_CPUS}
        ),
        run_config=RunConfig(
            name="checkpoints",  # Ray registers checkpoints that lie in its own run folder without copying them
            storage_path=str(run),
            failure_config=FailureConfig(max_failures=2),
        ),
        datasets={"train": ray.data.range(1)},
        dataset_config=PlanConfig(),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise_failure(run)
        raise told(error) from error
    raise_failure(run)


def _check_cpus(available: float, workers: int) -> None:
    """With too few logical CPUs for the workers and their reads, both would wait for each other for ever."""
    needed = math.ceil(workers * (WORKER_CPUS + READ_CPUS))
    if available < needed:
        raise UserError(
            f"the cluster has {available:g} CPUs but {workers} workers and their reads need {needed}; lower "
            f"'workers' or start Ray with more logical CPUs (ray start --head --num-cpus {needed})",
            "too_few_cpus",
        )
