"""Ray Train runs the loop: workers, process group, restarts; Ray Data feeds each rank its own plan. No math here.

A data set split over ranks promises no order, so it cannot give the same samples again after a restart. Instead each
rank gets a data set made from its own part of the plan, built anew at every start of the worker group from the newest
checkpoint; the loop checks that every batch is the one of its step.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lumen_ray import config
from lumen_ray.data.feed import (
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
from lumen_ray.train.loop import DivergedError, Job, Trainer
from lumen_ray.train.memory import keep_freed_memory
from lumen_ray.train.recipe import Recipe

Progress = Callable[[dict[str, Any]], None]


@dataclass
class Prepared:
    job: Job
    reader: BatchReader
    manifest: dict[str, Any]


def prepare_job(shards: str | Path, recipe: Recipe, run: str | Path, init_from: str | None = None) -> Prepared:
    """Checks everything that can be wrong before a worker starts; trains the tokenizer on the shards' text.

    A run folder keeps its recipe: continuing it with another one is a `UserError`.
    """
    run = Path(run).absolute()
    manifest = read_manifest(shards)
    settings = config.load(ModelSettings, model_path(recipe.model))
    newest = checkpoint.latest(run)
    if newest:
        checkpoint.check_preset(newest, settings.name)
    saved = run / "recipe.json"
    wanted = recipe.model_dump(mode="json")
    if saved.is_file() and newest and json.loads(saved.read_text()) != wanted:
        raise UserError(
            f"'{run}' holds a run of another recipe; choose another output folder or the same recipe", "run_exists"
        )
    run.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(wanted))
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

    trainer = Trainer(config["job"], device, publish)
    trainer.fit(ray_batches(ray.train.get_dataset_shard("train")))


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
    if (run / "model" / "model.safetensors").is_file() and _finished(run, recipe):
        return run / "model"
    watcher = _Watcher(run / "metrics.jsonl", progress) if progress else None
    try:
        _fit(prepared, run)
    finally:
        if watcher:
            watcher.stop()
    return run / "model"


def _finished(run: Path, recipe: Recipe) -> bool:
    newest = checkpoint.latest(run)
    return newest is not None and checkpoint.position(newest)["step"] == recipe.total_steps


def _fit(prepared: Prepared, run: Path) -> None:
    from lumen_ray.ray_env import init_local

    init_local()
    import ray
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = prepared.job.recipe
    _check_cpus(int(ray.cluster_resources().get("CPU", 0)), recipe.workers)

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
        scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=gpu, resources_per_worker={"CPU": 1}),
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
        raise _told(error) from error


def _check_cpus(available: int, workers: int) -> None:
    """A worker and its reads need a logical CPU each; with fewer, both would wait for each other for ever."""
    if available < 2 * workers:
        raise UserError(
            f"the cluster has {available} CPUs but {workers} workers and their reads need {2 * workers}; lower "
            f"'workers' or start Ray with more logical CPUs (ray start --head --num-cpus {2 * workers})",
            "too_few_cpus",
        )


def _told(error: BaseException) -> BaseException:
    """The user's or the run's own error out of Ray's wrappers, else the error as it is."""
    queue, seen = [error], set()
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, (UserError, DivergedError)):
            return UserError(str(current), getattr(current, "reason", "training_diverged"))
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return error


class _Watcher:
    """Passes the lines that rank 0 appends to `metrics.jsonl` to a callback while the run goes on."""

    def __init__(self, path: Path, progress: Progress):
        self._path, self._progress = path, progress
        self._position = path.stat().st_size if path.exists() else 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._read()
        self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with open(self._path) as file:
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                self._progress(json.loads(line))

    def stop(self) -> None:
        self._done.set()
        self._thread.join(timeout=10)
