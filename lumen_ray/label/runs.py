"""Runs the workers of a label job: in this process, or in an actor pool of Ray Data that grows with the cluster."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from lumen_ray.errors import UserError
from lumen_ray.label.content_index import ContentIndex, RemoteIndex
from lumen_ray.label.listing import Listing
from lumen_ray.label.plan import Fragment, Plan, reference
from lumen_ray.label.workers import LabelActor, Labeller, Outcome, WorkerSettings

#: Seconds without a result after which Ray Data gives up (its default: 30 minutes); loading a large model must fit.
NO_PROGRESS_TIMEOUT_S = 3600
#: Fragments of one task: one at first, more once many have been handed out, since a task costs the driver 7 ms.
MOST_PER_TASK = 64
_TASKS_PER_STEP = 64
#: by default an actor is started for this many images, as it takes seconds to load the model
_IMAGES_PER_ACTOR = 64
_MOST_CPU_ACTORS = 8
#: decoding threads of an actor with a GPU on a cluster
THREADS_PER_GPU = 4


@dataclass(frozen=True)
class Work:
    """The fragments of a plan that are not `done`; `listing`: the input, if it may hold images that are not planned;
    `failed`: fragments that are done but have images to ask again, and the number of these."""

    plan: Plan
    done: Collection[int]
    listing: Listing | None
    failed: Mapping[int, int] = field(default_factory=dict)

    def fragments(self) -> Iterator[Fragment]:
        for fragment in self.plan.fragments(self.listing):
            if fragment.index not in self.done or fragment.index in self.failed:
                yield fragment

    def tasks(self) -> Iterator[list[Fragment]]:
        """The fragments in groups for one task each."""
        group: list[Fragment] = []
        number = 0
        for fragment in self.fragments():
            group.append(fragment)
            if len(group) >= task_size(number):
                yield group
                group, number = [], number + 1
        if group:
            yield group


def task_size(number: int) -> int:
    """The fragments of task `number`, counted from 0."""
    return min(MOST_PER_TASK, 1 + number // _TASKS_PER_STEP)


@dataclass(frozen=True)
class Pool:
    """Which workers do the work of a job.

    num_actors: on Ray, fewest and most of them as a range; None: as many as the cluster has GPUs or, without any, cores
    for; 0: a `labeller` in this process. gpus_per_actor: the share of a GPU that an actor on one reserves, up to 1.
    dedup: images with equal bytes are labelled once, as far as the workers know of each other.
    """

    num_actors: range | int | None = None
    gpus_per_actor: float = 1
    dedup: bool = False
    labeller: type[Labeller] = Labeller
    actor: type[LabelActor] = LabelActor

    @property
    def is_remote(self) -> bool:
        return self.num_actors != 0

    def run(self, work: Work, settings: WorkerSettings) -> Iterator[Outcome]:
        """The outcomes of the work, on Ray in no particular order."""
        return _label_on_ray(work, settings, self) if self.is_remote else _label_in_process(work, settings, self)


def _label_in_process(work: Work, settings: WorkerSettings, pool: Pool) -> Iterator[Outcome]:
    worker = pool.labeller(replace(settings, index=ContentIndex(settings.output) if pool.dedup else None))
    for fragment in work.fragments():
        yield worker.label([fragment])


def _label_on_ray(work: Work, settings: WorkerSettings, pool: Pool) -> Iterator[Outcome]:
    """Starts a local Ray if none is running."""
    from lumen_ray.ray_env import cluster_resources, init_local, prepare_environment
    from lumen_ray.ray_log import native_lines_in_file

    prepare_environment()
    import ray
    import ray.data

    if not ray.is_initialized():
        init_local()
    available = cluster_resources()
    available["GPU"] = int(available["GPU"]) * math.floor(1 / pool.gpus_per_actor + 1e-6)  # an actor uses one only
    number = pool.num_actors
    if isinstance(number, int):
        number = range(number, number + 1)
    if number is None:
        number = default_actors(settings.device, available, work.plan.num_images(), work.plan.is_complete)
    settings, (num_cpus, num_gpus) = actor_resources(settings, number, available)
    number = for_tasks(number, work)
    # an input that is still being listed may turn out to have fewer tasks than the pool has actors
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors for")
    if pool.dedup:
        settings = replace(settings, index=RemoteIndex.start(settings.output))
    with _data_context(ray.data.DataContext.get_current()):
        dataset = (
            ray.data.from_items([{"work": pickle.dumps(work)}], override_num_blocks=1)
            .flat_map(_listed, num_cpus=0)
            .map_batches(
                pool.actor,
                fn_constructor_args=(settings,),
                batch_size=None,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(min_size=number[0], max_size=number[-1]),
                num_cpus=num_cpus,
                num_gpus=num_gpus * pool.gpus_per_actor,
            )
        )
        with native_lines_in_file():
            for row in dataset.iter_rows():
                yield Outcome.from_json(row["outcome"])


def _listed(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs on the cluster: lists the input while its first images are labelled. A task that Ray repeats reads the plan
    that it wrote before, and so yields the same again.

    The listing is soon done, and its rows wait in the driver: they refer to the plan, whatever the number of images."""
    work: Work = pickle.loads(row["work"])
    try:
        for fragments in work.tasks():
            yield {"fragments": reference(fragments), "outcome": ""}
    except UserError as error:
        yield {"fragments": "", "outcome": Outcome(stop=(str(error), error.reason)).to_json()}


def default_actors(device: str | None, available: Mapping[str, float], images: int, is_all: bool) -> range:
    """How many actors are started by default: as many as fit on the GPUs, else one per core of this machine or CPU of
    the cluster, at most `_MOST_CPU_ACTORS`; fewer for few images. A pool on a cluster starts with one and grows.

    available: "CPU", and "GPU": the actors that fit on GPUs; `is_all`: there are no more images than these.
    """
    gpus = int(available.get("GPU", 0)) if device != "cpu" else 0
    cores = _local_cores() or int(available.get("CPU", 1))
    most = max(1, gpus or min(cores, _MOST_CPU_ACTORS))
    number = min(most, max(1, math.ceil(images / _IMAGES_PER_ACTOR))) if is_all else most
    return range(number if _local_cores() else 1, number + 1)


def for_tasks(number: range, work: Work) -> range:
    """`number` of actors, without those for which a listed input has no task: each would load a model for nothing."""
    if work.listing is not None:
        return number
    tasks = max(1, sum(1 for _ in islice(work.tasks(), number[-1])))
    return range(min(number[0], tasks), min(number[-1], tasks) + 1)


def _local_cores() -> int | None:
    """The cores of this machine where Ray runs on it alone: a local Ray has more logical CPUs than cores."""
    return None if os.environ.get("RAY_ADDRESS") else os.cpu_count() or 1


def actor_resources(
    settings: WorkerSettings, pool: range, available: Mapping[str, float]
) -> tuple[WorkerSettings, tuple[int, int]]:
    """The settings of an actor with its device and threads, and the (CPUs, GPUs) to reserve: Ray hides other GPUs from
    it.

    pool: fewest and most actors, as a range; available: as of `default_actors`. GPUs are used if there are any.
    Raises `UserError` if the fewest actors do not fit.
    """
    on_gpu = settings.device == "cuda" or (settings.device is None and available.get("GPU", 0) >= 1)
    _check_resources(available, pool[0], on_gpu)
    cores = _local_cores()
    most = min(pool[-1], max(pool[0], int(available.get("GPU" if on_gpu else "CPU", 1))))
    threads = 1 if cores is None and not on_gpu else max(1, (cores or THREADS_PER_GPU * most) // most)
    settings = replace(settings, threads=threads)
    if on_gpu:
        return settings, (0, 1)
    return replace(settings, device="cpu"), (1, 0)


def _check_resources(available: Mapping[str, float], num_actors: int, on_gpu: bool) -> None:
    """Raises `UserError` for actors that do not fit, for which Ray Data would wait silently."""
    kind = "GPU" if on_gpu else "CPU"
    have = int(available.get(kind, 0))
    if num_actors > have:
        others = ([f"at most {have}"] if have else []) + (["device 'cpu'"] if on_gpu else [])
        raise UserError(
            f"{num_actors} actors are too many: the {kind}s of the Ray cluster have room for {have}; give "
            f"{' or '.join(others)}",
            "too_many_actors",
        )


@contextlib.contextmanager
def _data_context(context: Any) -> Iterator[None]:
    """Applies Ray Data's settings for a job, and restores the previous ones afterwards."""
    changes = {
        "enable_progress_bars": False,
        "execution_no_progress_timeout_s": NO_PROGRESS_TIMEOUT_S,
        "target_max_block_size": 1,  # a block for each row: a task begins as soon as its fragments are listed
    }
    before = {name: getattr(context, name) for name in changes}
    for name, value in changes.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
