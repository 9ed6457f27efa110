"""The input pipeline (row groups -> decode -> augment -> collate on Ray Data) against torch's DataLoader.

Both run the same `BatchReader` over the same plan in as many processes, and hand whole batches to a consumer that does
nothing with them. On both sides a process makes the next batch while a thread of it hands the one before over: in the
DataLoader the feeder of its queue, in Ray Data's task the one that makes batches (`feed.one_ahead`).

When to start the clock: a Ray Data task makes `STEPS_PER_BLOCK` consecutive steps, a DataLoader's process every
`workers`-th. Batches come in the order of the plan, so while the first task's arrive, those of the tasks beside it pile
up: with N processes, 16 (N - 1) more lie ready when 16 have come. If the clock started there, they would count as made
in no time. So the first and the last *round* of both sides, a block for every process, are left out, and whole rounds
are timed between them: the clock starts and stops at the same place of the pattern, with all processes at work. Every
batch is stamped when it is made; what lay ready at the start beyond what lies ready at the end is not counted, and both
are reported (`ready_images`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.bench.workload import Stamped, StampedBatch, check_batches, make_recipe, plan_of, same, scene_shards
from lumen_ray.data.batches.feed import STEPS_PER_BLOCK, dataset_for_rank, plan_items, ray_batches
from lumen_ray.errors import UserError
from lumen_ray.train.launch import prepare_job

AIM = 1.0
BATCH_SIZE = 16
ROUNDS = 7  # with the two that are not timed
LEAST_ROUNDS = 3
AUGMENT = {"flip_x": True, "scale": [0.8, 1.25], "shift": 0.05, "color": 0.4}


Reader = Callable[[dict[str, Any]], StampedBatch]
Source = Callable[[Reader, list[dict[str, Any]], int], Iterator[StampedBatch]]


class PlanDataset(Dataset):
    """A plan as a map-style data set: item t is the batch of step t."""

    def __init__(self, reader: Reader, items: list[dict[str, Any]]):
        self.reader, self.items = reader, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> StampedBatch:
        return self.reader(self.items[index])


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def loader_batches(reader: Reader, items: list[dict[str, Any]], workers: int) -> Iterator[StampedBatch]:
    """The batches of a DataLoader; its processes are not forked, since Ray's threads run in this one."""
    yield from DataLoader(
        PlanDataset(reader, items),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
    )


def pipeline_batches(reader: Reader, items: list[dict[str, Any]], workers: int) -> Iterator[StampedBatch]:
    """The batches as a training worker gets them."""
    yield from ray_batches(dataset_for_rank(reader, items, workers).streaming_split(1)[0])


@dataclass(frozen=True)
class Arrival:
    """A batch as the consumer sees it; times in seconds since the epoch."""

    made: float
    arrived: float
    images: int


def arrivals(batches: Iterable[StampedBatch]) -> list[Arrival]:
    return [Arrival(batch.made, time.time(), len(batch.image_ids)) for batch in batches]


def ready(seen: list[Arrival], index: int) -> int:
    """Images that had been made when batch `index` arrived, but came after it."""
    return sum(batch.images for batch in seen[index + 1 :] if batch.made <= seen[index].arrived)


def samples_per_s(seen: list[Arrival], margin: int) -> float:
    """Images per second between the first and the last `margin` batches.

    What lay ready when the clock started beyond what lies ready when it stops came for free and is not counted. The
    opposite is not credited: a side that hands over more slowly than it reads is as fast as it hands over.
    """
    first, last = margin - 1, len(seen) - margin - 1
    free = max(0, ready(seen, first) - ready(seen, last))
    images = sum(batch.images for batch in seen[first + 1 : last + 1]) - free
    return images / (seen[last].arrived - seen[first].arrived)


def round_steps(workers: int) -> int:
    """Steps in which every one of the reading processes works off one block of the plan."""
    return STEPS_PER_BLOCK * workers


def check(
    shards: str | Path | None = None, *, steps: int | None = None, batch_size: int = BATCH_SIZE, workers: int = 1
) -> None:
    """`UserError` for options that `bench` cannot run with."""
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

    `steps`: whole rounds, see `check`; `ROUNDS` of them when none are given.
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
    if not all(same(one, other) for one, other in pairs):
        raise SidesDiffer("the input pipeline and the DataLoader give different batches")
    reader = Stamped(prepared.reader)
    lying: dict[str, list[tuple[int, int]]] = {"Ray Data": [], "DataLoader": []}

    def measured(side: str, source: Source) -> float:
        seen = arrivals(source(reader, items, workers))
        lying[side].append((ready(seen, margin - 1), ready(seen, len(seen) - margin - 1)))
        return samples_per_s(seen, margin)

    rates = in_turns(
        {
            "Ray Data": lambda: measured("Ray Data", pipeline_batches),
            "DataLoader": lambda: measured("DataLoader", loader_batches),
        },
        turns,
    )
    return Result(
        "input",
        "samples/s",
        rates,
        AIM,
        equal=f"every tensor of the first {len(few)} batches",
        budget=f"{workers} reading processes a side, each with a thread beside it, {os.cpu_count()} cores",
        details={
            "batch_size": batch_size,
            "steps": steps,
            "untimed_steps": 2 * margin,
            "input_size": prepared.reader.input_size,
            "ready_images": lying,
        },
    )
