"""The data shown by `data inspect`: tables and sampled rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumen_ray import config
from lumen_ray.data import urls
from lumen_ray.data.batches import buckets
from lumen_ray.data.batches.buckets import with_sizes
from lumen_ray.data.batches.feed import BatchReader, read_texts
from lumen_ray.data.shards.shards import read_row_group
from lumen_ray.errors import unknown
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.recipe import BucketRange, Recipe
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.tokenizer import LumenTokenizer


@dataclass
class Section:
    """A table of the report. Columns from `first_number` on are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    first_number: int = 1


def shown(value: Any) -> str:
    """A table cell as text."""
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass
class View:
    """One sampled row as stored, and the training batch made of it alone, with the `tasks` of a group of the stage."""

    row: dict[str, Any]
    batch: TrainingBatch
    tasks: tuple[str, ...]
    image_tokens: int


def sample_places(manifest: dict[str, Any], number: int, seed: int) -> Iterator[tuple[str, int, int]]:
    """(file, row group, row) of `number` different rows, one drawn from each of as many equal parts of the folder."""
    rows = manifest["rows"]
    number = min(number, rows)
    rng = np.random.default_rng((seed, 4))
    bounds = np.arange(number + 1) * rows // max(number, 1)
    wanted = [int(rng.integers(low, high)) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    first = 0
    for file in manifest["files"]:
        for index, group in enumerate(file["row_groups"]):
            yield from ((file["path"], index, n - first) for n in wanted if first <= n < first + group["rows"])
            first += group["rows"]


class Sampler:
    """Makes the `View` of a row, with a stage of a recipe."""

    def __init__(self, folder: urls.Location, manifest: dict[str, Any], recipe: Recipe, stage: str | None = None):
        settings = config.load(ModelSettings, model_path(recipe.model))
        recipe = with_sizes(recipe, settings)
        self.folder, self.recipe, self.settings = urls.absolute(folder), recipe, settings
        self.stage = _stage_index(recipe, stage)
        tokenizer = LumenTokenizer.train(
            read_texts(self.folder, families=settings.families), settings.vocab_size, settings.families
        )
        self.reader = BatchReader.of(self.folder, recipe, tokenizer, settings, manifest)

    @property
    def tokenizer(self) -> LumenTokenizer:
        return self.reader.tokenizer

    def view(self, file: str, index: int, number: int, rng: np.random.Generator) -> View:
        """The row as stored and as in the first step of the stage. `rng` draws the task group."""
        (row,) = read_row_group(self.folder, file, index, [number])
        group = self._group(row, rng)
        bucket = None
        if self.recipe.buckets:
            assert not isinstance(self.recipe.buckets, BucketRange), "with_sizes has resolved it"
            size = (row["height"], row["width"])
            bucket = buckets.choose(size, self.recipe.buckets) if row["image"] else self.recipe.buckets[0]
        step = sum(stage.steps for stage in self.recipe.stages[: self.stage])
        part = (file, index, (number,))
        batch = self.reader({"step": step, "stage": self.stage, "group": group, "parts": [part], "bucket": bucket})
        height, width = batch.images.shape[-2:]
        images = int(batch.has_image[0]) + len(batch.further_rows)
        tokens = images * self.settings.image_tokens((height, width))
        return View(row, batch, self.recipe.stages[self.stage].groups[group].tasks, tokens)

    def _group(self, row: dict[str, Any], rng: np.random.Generator) -> int:
        """A group of the stage that the row is annotated for, drawn by weight; the first one if there is none."""
        groups = self.recipe.stages[self.stage].groups
        weights = np.array([g.weight * any(TASKS[t].annotation in row["tasks"] for t in g.tasks) for g in groups])
        return int(rng.choice(len(groups), p=weights / weights.sum())) if weights.any() else 0


def _stage_index(recipe: Recipe, name: str | None) -> int:
    names = [stage.name for stage in recipe.stages]
    if name is None:  # the one with the most tasks
        return max(range(len(names)), key=lambda i: len({t for g in recipe.stages[i].groups for t in g.tasks}))
    if name not in names:
        raise unknown("stage", name, names)
    return names.index(name)
