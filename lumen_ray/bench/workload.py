"""Workload of the training benches: shards, a recipe and the batches of its steps."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lumen_ray.data.batches.feed import BatchReader
from lumen_ray.data.batches.plan import Plan, batch_parts
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, read_manifest, write_manifest
from lumen_ray.recipe import Recipe
from lumen_ray.trunk.batch import TrainingBatch

ROWS_PER_GROUP = 8


def scene_shards(folder: Path, count: int, side: int, *, photos: bool = False) -> Path:
    """Writes shards of `count` rendered scenes of `side` pixels; `photos`: as noisy JPEG that decodes as slowly as a
    photograph."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "part-00000.parquet", rows_per_group=ROWS_PER_GROUP) as writer:
        for index in range(count):
            row = scenes.scene_row(0, index, side)
            writer.write({**row, "image": _as_photo(row["image"], rng)} if photos else row)
    categories = [
        {"name": name, "keypoints": list(scenes.SKELETONS.get(name, ())), "skeleton": []} for name in scenes.CLASSES
    ]
    assert writer.entry is not None
    write_manifest(folder, build_manifest([writer.entry], categories=categories))
    return folder


def _as_photo(png: bytes, rng: np.random.Generator) -> bytes:
    pixels = decode(png)
    grain = rng.normal(0, 8, pixels.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_recipe(
    steps: int, *, model: str, batch_size: int, workers: int = 1, augment: dict[str, Any] | None = None
) -> Recipe:
    """A recipe of one stage with all tasks; its learning rate does not matter here."""
    stage = {"name": "bench", "steps": steps, "augment": augment or {}}
    return Recipe.model_validate(
        {"name": "bench", "model": model, "batch_size": batch_size, "workers": workers, "stages": [stage]}
    )


def plan_of(manifest: dict[str, Any], recipe: Recipe) -> Plan:
    return Plan(manifest, recipe, recipe.workers)


def check_batches(shards: str | Path | None, batch_size: int, workers: int) -> None:
    """Raises `UserError` if shards do not exist, or if batches of that size cannot be made of their row groups.

    None stands for rendered scenes, which need not exist yet.
    """
    rendered = {"files": [{"row_groups": [{"rows": ROWS_PER_GROUP}]}]}
    recipe = make_recipe(1, model="", batch_size=batch_size, workers=workers)
    batch_parts(read_manifest(shards) if shards else rendered, recipe, workers)


@dataclass
class StampedBatch(TrainingBatch):
    """A batch with the time at which it was made, in seconds since the epoch."""

    made: float = 0.0


@dataclass
class StampingReader:
    """A reader whose batches have the time at which they were made."""

    reader: BatchReader

    def __call__(self, item: dict[str, Any]) -> StampedBatch:
        return StampedBatch(**vars(self.reader(item)), made=time.time())


def batches_equal(one: Any, other: Any) -> bool:
    """Whether two batches are bit-equal, apart from the time that reading them took."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() - {"read_s"}
        return keys == other.keys() - {"read_s"} and all(batches_equal(one[key], other[key]) for key in keys)
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and batches_equal(vars(one), vars(other))
    return one == other
