"""Starts training runs: on Ray (`train`), or in the calling processes (`train_local`). Both call `_train_rank`.

Ray Train starts workers, process group and restarts; Ray Data feeds each rank. A data set split over ranks guarantees
no order, so it could not repeat the same samples after a restart. Instead each rank builds a data set from its share of
the plan, again at every start, from the step of the checkpoint that the ranks agreed on; the trainer checks that every
batch belongs to its step.
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

from lumen_ray.data import files, urls
from lumen_ray.data.batches.buckets import with_sizes
from lumen_ray.data.batches.feed import BatchReader, dataset_for_rank, plan_items, ray_batches, skeletons_of
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.output_folder import OutputFolder
from lumen_ray.data.shards.shards import read_manifest
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta
from lumen_ray.recipe import BucketRange, Recipe
from lumen_ray.tasks import CLASS_TASKS, TASKS, TEXT_ROUTES, task_of_route
from lumen_ray.train import parallel, precision
from lumen_ray.train.checks import check_recipe
from lumen_ray.train.metrics.metrics import MetricsWatcher, Progress
from lumen_ray.train.metrics.profiler import check_profile
from lumen_ray.train.metrics.prometheus import count_restart
from lumen_ray.train.metrics.sources import rows_by_source
from lumen_ray.train.run import checkpoint, malloc
from lumen_ray.train.run.capacity import CapacityWatcher, Demand, capacity_reader
from lumen_ray.train.run.failures import as_user_error
from lumen_ray.train.run.folder import sole_starter, sole_writer
from lumen_ray.train.run.resources import of_worker, uses_gpus
from lumen_ray.train.run.start import StartPoint, make_start, resolve_model
from lumen_ray.train.trainer import Trainer, TrainingJob
from lumen_ray.train.validation import Validator
from lumen_ray.trunk.batch import TrainingBatch

ReadBatches = Callable[[list[dict[str, Any]]], Iterator[TrainingBatch]]


@dataclass
class PreparedRun:
    """A checked run, ready to start; plain values, so that Ray can ship it."""

    job: TrainingJob
    reader: BatchReader
    manifest: dict[str, Any]

    @property
    def model(self) -> str:
        """The folder of the trained model, a path or URL."""
        return urls.join(self.job.run, "model")


def prepare_job(
    shards: str | Path,
    recipe: Recipe,
    run: str | Path,
    init_from: str | None = None,
    validator: Validator | None = None,
) -> PreparedRun:
    """Checks a run before any worker starts, and makes its start point; trains the tokenizer on the shards' text.

    `init_from`: model folder to start from, in place of the recipe's. `validator`: carries out the recipe's
    `validation`, which is left out without one. Raises `UserError` for what the user must change, also if the run
    folder holds a run with another recipe, model, shards or start, or if another process trains into it.
    """
    with _prepared(shards, recipe, run, init_from, validator) as prepared:
        return prepared


@contextmanager
def _prepared(
    shards: str | Path, recipe: Recipe, run: str | Path, init_from: str | None, validator: Validator | None
) -> Iterator[PreparedRun]:
    """`prepare_job`; other processes cannot start a run in the folder while the context is open."""
    folder = urls.absolute(run)
    manifest = read_manifest(shards)
    recipe, settings = resolve_model(recipe, init_from)
    recipe = with_sizes(recipe, settings)
    with sole_starter(folder):
        with sole_writer(folder), OutputFolder(folder) as run_files:
            run_files.fetch()
            start = make_start(run_files, shards, recipe, settings, manifest)
        check_recipe(recipe, settings, len(start.tokenizer))
        if settings.prompt_layout == "sequential" and _trains_links(recipe, manifest):
            raise UserError(
                "the shards have answers with links, which need prompt_layout 'branches'; train chats in a group of "
                "their own, without detect, ground and segment",
                "wrong_layout",
            )
        skeletons = skeletons_of(manifest)
        meta = _meta(recipe, start, manifest, skeletons)
        if validator:
            validator.check(settings, meta)
        check_profile(recipe, folder, checkpoint.start_step(checkpoint.latest(folder)))
        job = TrainingJob(recipe, start, meta, folder, rows_by_source(manifest), validator)
        reader = BatchReader.of(urls.absolute(shards), recipe, start.tokenizer, settings, manifest)
        yield PreparedRun(job, reader, manifest)


def _buckets(manifest: dict[str, Any], recipe: Recipe) -> list[list[int]]:
    """(height, width) of the inputs that training uses; the model would detect little at any other size."""
    buckets = recipe.buckets or ()
    assert not isinstance(buckets, BucketRange)  # `with_sizes` has listed them
    used = Plan(manifest, recipe).used_buckets if len(buckets) > 1 else buckets
    return [list(bucket) for bucket in used]


def _trains_links(recipe: Recipe, manifest: dict[str, Any]) -> bool:
    """Whether a step can draw messages with links: it trains chats together with the task of a link."""
    linked = {task_of_route(token).name for token in TEXT_ROUTES}
    groups = [set(group.tasks) for stage in recipe.stages for group in stage.groups]
    chats = {task.name for task in TASKS.values() if task.is_conversation}
    return manifest.get("links", 0) > 0 and any(tasks & chats and tasks & linked for tasks in groups)


def _trains_exemplars(recipe: Recipe) -> bool:
    """Whether a step can show a class by example."""
    return any(
        stage.branches.exemplars > 0 and set(CLASS_TASKS) & {name for group in stage.groups for name in group.tasks}
        for stage in recipe.stages
    )


def _meta(
    recipe: Recipe, start_point: StartPoint, manifest: dict[str, Any], skeletons: dict[str, tuple[str, ...]]
) -> ModelMeta:
    """Metadata of the model to export: tasks of the recipe and of the model it starts from; classes of the shards;
    skeletons of the shards and, if that model has learned poses, of its other classes; whether one of the two taught it
    links in texts, or classes by example."""
    categories, start = manifest["categories"], start_point.meta
    meta = ModelMeta(
        preset=start_point.settings.name,
        classes=[c["name"] for c in categories if not c.get("supercategory_only")],
        skeletons={name: list(points) for name, points in skeletons.items()},
        edges={c["name"]: c.get("skeleton") or [] for c in categories if c.get("keypoints")},
        buckets=_buckets(manifest, recipe),
        tasks=[task for task in TASKS if task in recipe.tasks or (start and task in start.tasks)],
        writes_behind_routes=_trains_links(recipe, manifest) or bool(start and start.writes_behind_routes),
        reads_exemplars=_trains_exemplars(recipe) or bool(start and start.reads_exemplars),
    )
    if start and "pose" in start.tasks:
        meta.skeletons, meta.edges = start.skeletons | meta.skeletons, start.edges | meta.edges
    return meta


def train_local(prepared: PreparedRun, device: str = "cpu") -> Path | str:
    """Trains without Ray: as the only rank, or as a rank of the process group that this process belongs to. Batches are
    read in the same process. Returns the model folder."""
    with sole_starter(prepared.job.run) if parallel.rank() == 0 else nullcontext():
        _train_rank(prepared, torch.device(device))
    return _path_or_url(prepared.model)


def _path_or_url(location: str) -> Path | str:
    return location if urls.is_url(location) else Path(location)


def _train_rank(prepared: PreparedRun, device: torch.device, read: ReadBatches | None = None) -> None:
    """Trains as one rank from the newest checkpoint on, with or without Ray. `read` makes the batches of the rank's
    plan items; by default `prepared.reader` does, one batch at a time."""
    run, recipe = prepared.job.run, prepared.job.recipe
    rank, ranks = parallel.rank(), parallel.world_size()
    try:
        with sole_writer(run) if rank == 0 else nullcontext(), OutputFolder(run) as run_files:
            if rank == 0:
                checkpoint.clean(run)
                run_files.fetch()
            parallel.barrier()  # no rank lists checkpoints while a rank of an earlier try can still publish one
            trainer = Trainer(prepared.job, device, run_files)
            items = plan_items(Plan(prepared.manifest, recipe), rank, ranks, trainer.step)
            batches = read(items) if read else map(prepared.reader, items)
            trainer.fit(logged(batches, run_files) if recipe.log_samples else batches)
    except Exception as error:
        cause = as_user_error(error, run)
        raise cause from (None if cause is error else error)


def logged(batches: Iterator[TrainingBatch], run: OutputFolder) -> Iterator[TrainingBatch]:
    """Passes batches on and appends the image ids of each to `RUN/samples/<rank>.jsonl`.

    A step repeated after a restart has another line: the last one of a step counts.
    """
    name = f"samples/{parallel.rank()}.jsonl"
    run.fetch(name)
    path = run.folder / name
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
    prepared: PreparedRun = config["prepared"]

    def read(items: list[dict[str, Any]]) -> Iterator[TrainingBatch]:
        # a split into one part keeps the order and moves the executor into an actor; as a thread of this process it
        # would compete with the training step for the interpreter lock and halve its speed
        dataset = dataset_for_rank(prepared.reader, items, prepared.job.recipe.readers)
        yield from ray_batches(dataset.streaming_split(1)[0])

    _train_rank(prepared, device, read)


def train(
    shards: str | Path,
    recipe: Recipe,
    run: str | Path,
    *,
    init_from: str | None = None,
    validator: Validator | None = None,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Path | str:
    """Runs a recipe on Ray, from the newest checkpoint in `run` on; returns the model folder, a URL if `run` is one.

    `validator`: carries out the recipe's `validation`. `progress` is called with every line of `metrics.jsonl` as it is
    written, `waiting` with a sentence when the run waits for resources of the cluster. Raises `UserError` for what the
    user must change, also if another process trains into `run`.
    """
    with _prepared(shards, recipe, run, init_from, validator) as prepared:
        recipe, folder = prepared.job.recipe, prepared.job.run
        Plan(prepared.manifest, recipe, recipe.workers)  # raises for wrong batch sizes before workers start
        start = checkpoint.start_step(checkpoint.latest(folder))
        if start < recipe.total_steps:
            with MetricsWatcher(urls.join(folder, "metrics.jsonl"), start, progress) if progress else nullcontext():
                _train_on_ray(prepared, waiting)
        elif not files.is_file(
            urls.join(prepared.model, "model.safetensors")
        ):  # killed between the last checkpoint and export
            _train_rank(prepared, torch.device("cpu"))
        return _path_or_url(prepared.model)


def _train_on_ray(prepared: PreparedRun, waiting: Callable[[str], None] | None) -> None:
    """Trains until all steps are done, or until `max_failures` restarts have brought no new checkpoint."""
    from lumen_ray.ray_env import cluster_resources, init_local

    init_local()
    import ray.train

    run, recipe = prepared.job.run, prepared.job.recipe
    use_gpu = uses_gpus(cluster_resources(), recipe)
    if note := precision.advice(recipe.precision, torch.device("cuda" if use_gpu else "cpu")):
        warnings.warn(note, stacklevel=2)
    demand = Demand(recipe.min_workers or recipe.workers, of_worker(use_gpu))
    while True:
        before = checkpoint.latest(run)
        trainer = _ray_trainer(prepared, use_gpu)
        try:
            with CapacityWatcher(demand, capacity_reader(trainer), waiting) if waiting else nullcontext():
                trainer.fit()
            return
        except SystemExit:  # Ray's answer to SIGINT, once it has ended the workers
            raise KeyboardInterrupt from None
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            cause = as_user_error(error, run)
            if isinstance(cause, UserError) or checkpoint.latest(run) == before:
                raise cause from (None if cause is error else error)


def _ray_trainer(prepared: PreparedRun, use_gpu: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class GiveUp(UserCallback):
        """Ends a run whose error would recur on another try: Ray does not retry errors raised here."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(cause := as_user_error(error, run), UserError):
                    raise cause
            count_restart(run, next(iter(worker_exceptions.values())))

    run, recipe = prepared.job.run, prepared.job.recipe
    store, path = files.filesystem(run)
    elastic = 0 < recipe.min_workers < recipe.workers
    # the ignores: Ray's type hints are those of Train V1, and V2 is what `ray.train` exports at run time
    return TorchTrainer(
        _worker,
        # read here, where it is the user's setting: in the workers Ray sets the variable itself
        train_loop_config={"prepared": prepared, "threads": int(os.environ.get("OMP_NUM_THREADS") or 0)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(recipe.min_workers, recipe.workers) if elastic else recipe.workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=of_worker(use_gpu),
            placement_strategy="PACK" if use_gpu else "SPREAD",  # a CPU rank uses all cores of its node
        ),
        run_config=RunConfig(
            # checkpoints are not registered with Ray: it does not write its list of them atomically, so a kill could
            # leave a run that cannot be started again
            name=".ray",
            storage_path=path,
            storage_filesystem=store if urls.is_url(run) else None,
            failure_config=FailureConfig(max_failures=recipe.max_failures),
            callbacks=[GiveUp()],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": malloc.ENVIRONMENT},  # type: ignore[call-arg]
        ),
    )
