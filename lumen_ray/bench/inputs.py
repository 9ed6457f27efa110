"""The input pipeline (row groups -> decode -> augment -> collate on Ray Data) against torch's DataLoader.

Both run the same `BatchReader` over the same plan in as many processes, and hand whole batches to a consumer that does
nothing with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lumen_ray.bench.timing import Result, in_turns
from lumen_ray.bench.workload import make_recipe, plan_of, same, scene_shards
from lumen_ray.data.feed import BatchReader, dataset_for_rank, plan_items, ray_batches
from lumen_ray.train.trainer import prepare_job

AIM = 1.0
AUGMENT = {"flip_x": True, "scale": [0.8, 1.25], "shift": 0.05, "color": 0.4}


class PlanDataset(Dataset):
    """A plan as a map-style data set: item t is the batch of step t."""

    def __init__(self, reader: BatchReader, items: list[dict[str, Any]]):
        self.reader, self.items = reader, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.reader(self.items[index])


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def loader_batches(reader: BatchReader, items: list[dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    """The batches of a DataLoader; its processes are not forked, since Ray's threads run in this one."""
    yield from DataLoader(
        PlanDataset(reader, items),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
    )


def pipeline_batches(reader: BatchReader, items: list[dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    """The batches as a training worker gets them."""
    yield from ray_batches(dataset_for_rank(reader, items, workers).streaming_split(1)[0])


def samples_per_s(batches: Iterable[dict[str, Any]], warm: int) -> float:
    """Images per second after the first `warm` batches."""
    images, began = 0, None
    for number, batch in enumerate(batches):
        if began is not None:
            images += len(batch["image_ids"])
        if number + 1 == warm:
            began = time.perf_counter()
    return images / (time.perf_counter() - began)


def bench(
    folder: Path,
    shards: str | Path | None = None,
    *,
    model: str = "nano-256",
    steps: int = 96,
    warm: int = 16,
    batch_size: int = 16,
    workers: int = 1,
    turns: int = 3,
    images: int = 192,
) -> Result:
    """Samples per second of both sides, over `shards` or over rendered photographs of 640 pixels."""
    from lumen_ray.ray_env import init_local

    shards = shards or scene_shards(folder / "photos", images, 640, photos=True)
    recipe = make_recipe(steps, model=model, batch_size=batch_size, augment=AUGMENT)
    prepared = prepare_job(shards, recipe, folder / "input")
    items = plan_items(plan_of(prepared.manifest, recipe), 0, 1)
    init_local()
    reader = prepared.reader
    few = items[: max(2, warm)]
    pairs = zip(pipeline_batches(reader, few, workers), loader_batches(reader, few, workers), strict=True)
    if not all(same(one, other) for one, other in pairs):
        raise RuntimeError("the input pipeline and the DataLoader give different batches")
    rates = in_turns(
        {
            "Ray Data": lambda: samples_per_s(pipeline_batches(reader, items, workers), warm),
            "DataLoader": lambda: samples_per_s(loader_batches(reader, items, workers), warm),
        },
        turns,
    )
    return Result(
        "input",
        "samples/s",
        rates,
        AIM,
        equal=f"every tensor of the first {len(few)} batches",
        budget=f"{workers} reading processes a side, {os.cpu_count()} cores",
        details={"batch_size": batch_size, "steps": steps, "warm": warm, "input_size": prepared.reader.input_size},
    )
