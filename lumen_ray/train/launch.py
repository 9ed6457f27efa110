"""Ray Train runs the loop: workers, process group, restarts; Ray Data feeds each rank its own plan. No math here.

A data set split over ranks promises no order, so it cannot give the same samples again after a restart. Instead each
rank makes a data set of its own part of the plan, anew at every start, from the step of the checkpoint that the ranks
agreed on; the loop checks that every batch is the one of its step.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lumen_ray import config
from lumen_ray.data import files, urls
from lumen_ray.data.batches.buckets import with_sizes
from lumen_ray.data.batches.feed import BatchReader, dataset_for_rank, plan_items, ray_batches, skeletons_of
from lumen_ray.data.batches.negatives import class_frequencies
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.shards.shards import read_manifest
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, read_meta
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.warm_start import start_settings
from lumen_ray.presets import model_folder, model_path
from lumen_ray.recipe import Recipe
from lumen_ray.tasks import TASKS
from lumen_ray.train import parallel, precision
from lumen_ray.train.checks import check_recipe
from lumen_ray.train.metrics.metrics import MetricsWatcher, Progress
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run import malloc as memory
from lumen_ray.train.run.capacity import Demand, RoomWatcher, look_at
from lumen_ray.train.run.failures import as_user_error
from lumen_ray.train.run.folder import keep_start, keep_tokenizer, sole_starter, sole_writer, start_of
from lumen_ray.train.run.resources import of_worker, uses_gpus
from lumen_ray.train.trainer import Job, Trainer
from lumen_ray.trunk.batch import TrainingBatch


@dataclass
class Prepared:
    job: Job
    reader: BatchReader
    manifest: dict[str, Any]


def prepare_job(shards: str | Path, recipe: Recipe, run: str | Path, init_from: str | None = None) -> Prepared:
    """Checks everything that can be wrong before a worker starts; trains the tokenizer on the shards' text.

    A run folder keeps what it was started with: continuing it with anything else is a `UserError`, and so is a folder
    that somebody else trains into. `init_from`: where it starts, instead of where the recipe says.
    """
    with _prepared(shards, recipe, run, init_from) as prepared:
        return prepared


@contextmanager
def _prepared(shards: str | Path, recipe: Recipe, run: str | Path, init_from: str | None) -> Iterator[Prepared]:
    """`prepare_job`, whose run folder stays refused to other starters inside."""
    run = files.local_folder(run).absolute()
    init_from = init_from or recipe.init_from
    init_from = str(model_folder(init_from).absolute()) if init_from else None
    recipe = recipe.model_copy(update={"init_from": init_from})
    manifest = read_manifest(shards)
    settings = config.load(ModelSettings, model_path(recipe.model))
    if init_from:
        settings = start_settings(settings, init_from)
    elif settings.published_weights:
        raise UserError(
            f"preset '{settings.name}' needs published weights to start from; give the model folder that "
            f"'{settings.conversion}' makes with --init-from, or as 'init_from' in the recipe",
            "no_start",
        )
    recipe = with_sizes(recipe, settings)
    with sole_starter(run):
        with sole_writer(run):
            newest = checkpoint.latest(run)
            if newest:
                checkpoint.check_preset(newest, settings.name)
            keep_start(run, start_of(recipe, settings, manifest, init_from), resumes=newest is not None)
            tokenizer = keep_tokenizer(run, shards, settings, init_from, resumes=newest is not None)
        check_recipe(recipe, settings, len(tokenizer))
        skeletons = skeletons_of(manifest)
        meta = _meta(recipe, settings, manifest, skeletons, read_meta(init_from) if init_from else None)
        job = Job(recipe, settings, tokenizer, meta, str(run), init_from)
        reader = BatchReader(
            urls.absolute(shards), recipe, tokenizer, settings.image_size, skeletons, class_frequencies(manifest),
            settings.token_side, settings.prompt_layout, settings.input_rules,
        )  # fmt: skip
        yield Prepared(job, reader, manifest)


def _buckets(manifest: dict[str, Any], recipe: Recipe) -> list[list[int]]:
    """The sizes that the model sees in training. At one that it never saw it would find little."""
    several = recipe.buckets is not None and len(recipe.buckets) > 1
    used = Plan(manifest, recipe).used_buckets if several else recipe.buckets or ()
    return [list(bucket) for bucket in used]


def _meta(
    recipe: Recipe,
    settings: ModelSettings,
    manifest: dict[str, Any],
    skeletons: dict[str, tuple[str, ...]],
    start: ModelMeta | None,
) -> ModelMeta:
    """What the model will know: the tasks of the recipe and of `start`, the model it starts from; the classes of the
    shards; their skeletons, and those of other classes that `start` knows poses of."""
    categories = manifest["categories"]
    meta = ModelMeta(
        preset=settings.name,
        classes=[c["name"] for c in categories if not c.get("supercategory_only")],
        skeletons={name: list(points) for name, points in skeletons.items()},
        edges={c["name"]: c.get("skeleton") or [] for c in categories if c.get("keypoints")},
        buckets=_buckets(manifest, recipe),
        tasks=[task for task in TASKS if task in recipe.tasks or (start and task in start.tasks)],
    )
    if start and "pose" in start.tasks:
        meta.skeletons, meta.edges = start.skeletons | meta.skeletons, start.edges | meta.edges
    return meta


def train_local(prepared: Prepared, device: str = "cpu") -> Path:
    """The same run without Ray: batches are read in line, by this process as one rank, or by each process of the
    process group it belongs to. Returns the model folder."""
    run = Path(prepared.job.run)
    with sole_starter(run) if parallel.rank() == 0 else nullcontext():
        return _fit_in_line(prepared, torch.device(device))


def _fit_in_line(prepared: Prepared, device: torch.device) -> Path:
    _fit_rank(prepared, device, lambda items: (prepared.reader(item) for item in items))
    return Path(prepared.job.run) / "model"


def _fit_rank(prepared: Prepared, device: torch.device, read: Callable[[list], Iterator[TrainingBatch]]) -> None:
    """Trains as one rank from the newest checkpoint on; `read` makes batches of the rank's items."""
    run, recipe = Path(prepared.job.run), prepared.job.recipe
    rank, ranks = parallel.rank(), parallel.world_size()
    try:
        with sole_writer(run) if rank == 0 else nullcontext():
            if rank == 0:
                checkpoint.clean(run)
            parallel.barrier()  # nobody looks for checkpoints before an earlier try can publish none any more
            trainer = Trainer(prepared.job, device)
            batches = read(plan_items(Plan(prepared.manifest, recipe), rank, ranks, trainer.step))
            trainer.fit(logged(batches, run) if recipe.log_samples else batches)
    except Exception as error:
        cause = as_user_error(error, run)
        raise cause from (None if cause is error else error)


def logged(batches: Iterator[TrainingBatch], run: Path) -> Iterator[TrainingBatch]:
    """The batches, with what each step sees appended to `RUN/samples/<rank>.jsonl`.

    A step that is done again after a restart has another line: the last one of a step counts.
    """
    path = run / "samples" / f"{parallel.rank()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", buffering=1) as file:
        for batch in batches:
            file.write(json.dumps({"step": batch.step, "image_ids": batch.image_ids}) + "\n")
            yield batch


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train

    from lumen_ray.ray_env import prepare_data

    prepare_data()
    share = (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config["threads"] or max(1, share))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    prepared = config["prepared"]

    def read(items: list[dict[str, Any]]) -> Iterator[TrainingBatch]:
        # split in one: it keeps the order, and moves the executor into an actor; as a thread of this process it would
        # take the interpreter lock from the training step, which then ran at half speed
        yield from ray_batches(
            dataset_for_rank(prepared.reader, items, prepared.job.recipe.readers).streaming_split(1)[0]
        )

    _fit_rank(prepared, device, read)


def train(
    shards: str | Path,
    recipe: Recipe,
    run: str | Path,
    *,
    init_from: str | None = None,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Path:
    """Runs a recipe on Ray, resuming `run` where its newest checkpoint left it; returns the model folder.

    `progress` gets every line of `metrics.jsonl` as it is written, `waiting` a sentence when the run waits for room in
    the cluster. Raises `UserError` for what the user must change, also while another process trains into `run`.
    """
    with _prepared(shards, recipe, run, init_from) as prepared:
        return _train(prepared, progress, waiting)


def _train(prepared: Prepared, progress: Progress | None, waiting: Callable[[str], None] | None) -> Path:
    recipe = prepared.job.recipe
    Plan(prepared.manifest, recipe, recipe.workers)  # wrong batch sizes are told before workers start
    run = Path(prepared.job.run)
    start = checkpoint.start_step(checkpoint.latest(run))
    if start == recipe.total_steps:
        if not (run / "model" / "model.safetensors").is_file():  # killed between the last checkpoint and the export
            _fit_in_line(prepared, torch.device("cpu"))
        return run / "model"
    watcher = MetricsWatcher(run / "metrics.jsonl", start, progress) if progress else None
    try:
        _fit(prepared, waiting)
    finally:
        if watcher:
            watcher.stop()
    return run / "model"


def _fit(prepared: Prepared, waiting: Callable[[str], None] | None) -> None:
    """Fits until it is done, or until `max_failures` restarts brought no new checkpoint."""
    from lumen_ray.ray_env import cluster_resources, init_local

    init_local()
    import ray.train

    run, recipe = Path(prepared.job.run), prepared.job.recipe
    use_gpu = uses_gpus(cluster_resources(), recipe)
    if note := precision.advice(recipe.precision, torch.device("cuda" if use_gpu else "cpu")):
        warnings.warn(note, stacklevel=2)
    demand = Demand(recipe.min_workers or recipe.workers, of_worker(use_gpu))
    while True:
        before = checkpoint.latest(run)
        trainer = _ray_trainer(prepared, use_gpu)
        try:
            with RoomWatcher(demand, look_at(trainer), waiting) if waiting else nullcontext():
                trainer.fit()
            return
        except SystemExit:  # which Ray makes of SIGINT once it has ended the workers
            raise KeyboardInterrupt from None
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            cause = as_user_error(error, run)
            if isinstance(cause, UserError) or checkpoint.latest(run) == before:
                raise cause from (None if cause is error else error)


def _ray_trainer(prepared: Prepared, use_gpu: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class GiveUp(UserCallback):
        """Ends a run whose error another try would not mend: an error here is one that Ray does not retry."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(cause := as_user_error(error, run), UserError):
                    raise cause

    run, recipe = Path(prepared.job.run), prepared.job.recipe
    elastic = 0 < recipe.min_workers < recipe.workers
    return TorchTrainer(
        _worker,
        # the user's setting, read here: in the workers Ray sets the variable itself
        train_loop_config={"prepared": prepared, "threads": int(os.environ.get("OMP_NUM_THREADS") or 0)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(recipe.min_workers, recipe.workers) if elastic else recipe.workers,
            use_gpu=use_gpu,
            resources_per_worker=of_worker(use_gpu),
            placement_strategy="PACK" if use_gpu else "SPREAD",  # a CPU rank has use for all cores of its node
        ),
        run_config=RunConfig(
            # checkpoints are not registered with Ray: its own list of them is not written atomically, so that a run
            # could be left that cannot be started again
            name=".ray",
            storage_path=prepared.job.run,
            failure_config=FailureConfig(max_failures=recipe.max_failures),
            callbacks=[GiveUp()],
            worker_runtime_env={"env_vars": memory.ENVIRONMENT},
        ),
    )
