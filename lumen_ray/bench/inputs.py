"""The input pipeline (row groups -> decode -> augment -> collate on Ray Data) against torch's DataLoader.

Both run the same `BatchReader` over the same plan in the same number of processes, and pass whole batches to a consumer
that discards them. On both sides a process makes the next batch while a thread passes on the last: in the DataLoader
the feeder of its queue, in Ray Data's task the thread that makes batches (`feed.one_ahead`).

When to start the clock: a Ray Data task makes `STEPS_PER_BLOCK` consecutive steps, a DataLoader process every
`workers`-th. Batches arrive in plan order, so while those of the first task arrive, those of the other tasks queue up:
with N processes, 16 (N - 1) more are ready when 16 have arrived, and would count as made in no time if the clock
started there. So the first and the last *round* of both sides, a block for every process, are left out, and whole
rounds are timed between them: the clock starts and stops at the same point of the pattern, with all processes at work.
Every batch is stamped when it is made; images ready at the start in excess of those ready at the end are not counted,
and both numbers are reported (`ready_images`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.bench.workload import (
    StampedBatch,
    StampingReader,
    batches_equal,
    check_batches,
    make_recipe,
    plan_of,
    scene_shards,
)
from lumen_ray.data.batches.feed import STEPS_PER_BLOCK, BatchReader, dataset_for_rank, plan_items, ray_batches
from lumen_ray.errors import UserError
from lumen_ray.train.launch import prepare_job
from lumen_ray.trunk.batch import TrainingBatch

AIM = 1.0
BATCH_SIZE = 16
ROUNDS = 7  # including the two that are not timed
LEAST_ROUNDS = 3
AUGMENT = {"flip_x": True, "scale": [0.8, 1.25], "shift": 0.05, "color": 0.4}

Reader = BatchReader | StampingReader


class PlanDataset(Dataset):
    """A plan as a map-style data set: item t is the batch of step t."""

    def __init__(self, reader: Reader, items: list[dict[str, Any]]):
        self.reader, self.items = reader, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> TrainingBatch:
        return self.reader(self.items[index])


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def loader_batches(reader: Reader, items: list[dict[str, Any]], workers: int) -> Iterator[TrainingBatch]:
    """The batches of a DataLoader. Its processes are spawned, as Ray's threads in this process forbid a fork."""
    yield from DataLoader(
        PlanDataset(reader, items),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
    )


def pipeline_batches(reader: Reader, items: list[dict[str, Any]], workers: int) -> Iterator[TrainingBatch]:
    """The batches of Ray Data, as a training worker gets them."""
    yield from ray_batches(dataset_for_rank(reader, items, workers).streaming_split(1)[0])


@dataclass(frozen=True)
class Arrival:
    """A batch at the consumer; times in seconds since the epoch."""

    made: float
    arrived: float
    images: int


def arrivals(batches: Iterable[StampedBatch]) -> list[Arrival]:
    """Consumes batches and records when each was made and arrived."""
    return [Arrival(batch.made, time.time(), len(batch.image_ids)) for batch in batches]


def ready(events: list[Arrival], index: int) -> int:
    """Images that were made before batch `index` arrived, and arrived after it."""
    return sum(batch.images for batch in events[index + 1 :] if batch.made <= events[index].arrived)


def samples_per_s(events: list[Arrival], margin: int) -> float:
    """Images per second between the first and the last `margin` batches.

    Images ready when the clock starts, in excess of those ready when it stops, are not counted. The opposite gives no
    credit: the rate of a side that passes batches on more slowly than it reads is that of passing them on.
    """
    first, last = margin - 1, len(events) - margin - 1
    free = max(0, ready(events, first) - ready(events, last))
    images = sum(batch.images for batch in events[first + 1 : last + 1]) - free
    return images / (events[last].arrived - events[first].arrived)


def round_steps(workers: int) -> int:
    """Steps in which every reading process makes one block of the plan."""
    return STEPS_PER_BLOCK * workers


def check(
    shards: str | Path | None = None, *, steps: int | None = None, batch_size: int = BATCH_SIZE, workers: int = 1
) -> None:
    """Raises `UserError` for options that `bench` cannot run with."""
    whole = round_steps(workers)
    if steps is not None and (steps % whole or steps < LEAST_ROUNDS * whole):
        near = max(LEAST_ROUNDS, round(steps / whole)) * whole
        raise UserError(
            f"--steps {steps} is not {LEAST_ROUNDS} or more whole rounds of {whole} steps, {STEPS_PER_BLOCK} for each "
            f"reading process, which the input bench times; give a multiple of {whole}, such as {near}",
            "invalid_option",
        )
    check_batches(shards, batch_size, 1)


def bench(
    folder: Path,
    shards: str | Path | None = None,
    *,
    model: str = "nano-256",
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int = 1,
    turns: int = 3,
    images: int = 192,
) -> Result:
    """Samples per second of both sides, over `shards` or over rendered photographs of 640 pixels.

    `steps`: whole rounds, see `check`; by default `ROUNDS` of them.
    """
    from lumen_ray.ray_env import init_local

    check(shards, steps=steps, batch_size=batch_size, workers=workers)
    margin = round_steps(workers)
    steps = steps or ROUNDS * margin
    shards = shards or scene_shards(folder / "photos", images, 640, photos=True)
    recipe = make_recipe(steps, model=model, batch_size=batch_size, augment=AUGMENT)
    prepared = prepare_job(shards, recipe, folder / "input")
    items = plan_items(plan_of(prepared.manifest, recipe), 0, 1)
    init_local()
    few = items[:margin]
    pairs = zip(
        pipeline_batches(prepared.reader, few, workers), loader_batches(prepared.reader, few, workers), strict=True
    )
    if not all(batches_equal(one, other) for one, other in pairs):
        raise SidesDiffer("the input pipeline and the DataLoader give different batches")
    reader = StampingReader(prepared.reader)
    sources = {"Ray Data": pipeline_batches, "DataLoader": loader_batches}
    ready_images: dict[str, list[tuple[int, int]]] = {side: [] for side in sources}

    def measured(side: str) -> float:
        batches = cast("Iterator[StampedBatch]", sources[side](reader, items, workers))
        events = arrivals(batches)
        ready_images[side].append((ready(events, margin - 1), ready(events, len(events) - margin - 1)))
        return samples_per_s(events, margin)

    rates = in_turns({side: partial(measured, side) for side in sources}, turns)
    return Result(
        "input",
        "samples/s",
        rates,
        AIM,
        equal=f"every tensor of the first {len(few)} batches",
        budget=f"{workers} reading processes on each side, with one more thread each, {os.cpu_count()} cores",
        details={
            "batch_size": batch_size,
            "steps": steps,
            "untimed_steps": 2 * margin,
            "input_size": prepared.reader.input_size,
            "ready_images": ready_images,
        },
    )
