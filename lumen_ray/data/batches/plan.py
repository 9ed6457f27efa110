"""The plan of a run: task group, input size and rows of step t, as a pure function of (seed, t).

Every rank computes the same plan without communication, so no rank waits in a collective that another skips. To resume
is to start the plan at step t; there is no list of consumed ids. Rows are shuffled once when the shards are written,
row groups anew in each epoch. With one input size a step trains whole row groups; with several size buckets its rows
are those of `buckets.BucketStream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lumen_ray.data.batches.buckets import BucketStream
from lumen_ray.data.shards.shards import row_sizes
from lumen_ray.errors import UserError
from lumen_ray.recipe import BucketRange, Recipe, Stage, TaskGroup
from lumen_ray.structures import Size
from lumen_ray.tasks import get_task

RowGroup = tuple[str, int, int]  # file, index, number of rows
_Pool = tuple[tuple[str, ...], bool]  # tasks, and whether rows have no image
RowSelection = RowGroup | tuple[str, int, tuple[int, ...]]  # a whole row group, or (file, index, numbers of its rows)


@dataclass(frozen=True)
class PlanStep:
    """`parts`: the global batch in order: row groups (file, index, number of rows), or single rows of them (file,
    index, (row,)). `bucket`: (height, width) of the model input in pixels; None for the preset's square."""

    step: int
    stage: int
    group: int
    parts: tuple[RowSelection, ...]
    bucket: Size | None = None

    def share(self, rank: int, world_size: int) -> tuple[RowSelection, ...]:
        """The parts of one rank; the shares of all ranks in order are the global batch.

        They are equal if the number of parts allows it, which it may not once a rank is lost.
        """
        first, end = (len(self.parts) * r // world_size for r in (rank, rank + 1))
        return self.parts[first:end]


def join_rows(parts: Sequence[RowSelection]) -> list[RowSelection]:
    """The same rows in the same order, with consecutive rows of a row group joined, so that they are read together."""
    out: list[RowSelection] = []
    for part in parts:
        file, index, rows = part
        before = out[-1] if out else None
        if isinstance(rows, tuple) and before is not None and before[:2] == (file, index):
            assert isinstance(before[2], tuple), "a batch consists of row groups or of rows"
            out[-1] = (file, index, (*before[2], *rows))
        else:
            out.append(part)
    return out


def batch_parts(manifest: dict[str, Any], recipe: Recipe, world_size: int) -> int:
    """Number of parts per step: row groups, or rows if there are several buckets.

    Raises `UserError` if the batch cannot be made of whole parts, evenly over the workers.
    """
    assert not isinstance(recipe.buckets, BucketRange), "buckets are resolved with the model's grid first"
    largest = max((g["rows"] for f in manifest["files"] for g in f["row_groups"]), default=0)
    if largest == 0:
        raise UserError("the shards have no rows; prepare them again", "empty_shards")
    if len(recipe.buckets or ()) > 1:
        if recipe.batch_size % world_size:
            raise UserError(
                f"batch_size {recipe.batch_size} must be a multiple of {world_size} workers; change one of them",
                "invalid_config",
            )
        return recipe.batch_size
    if recipe.batch_size % largest or (recipe.batch_size // largest) % world_size:
        raise UserError(
            f"batch_size {recipe.batch_size} must be a multiple of {largest} rows (a row group of the shards) times "
            f"{world_size} workers; change batch_size or workers, or prepare with another rows-per-group",
            "invalid_config",
        )
    return recipe.batch_size // largest


def check_micro_steps(stage: Stage, parts: int, world_size: int) -> None:
    """Raises `UserError` if the parts of a step cannot be split evenly over the micro-steps of all workers."""
    if parts % (world_size * stage.accumulate):
        raise UserError(
            f"stage '{stage.name}': accumulate {stage.accumulate} times {world_size} workers must divide the {parts} "
            "parts of a batch (row groups, or rows with several buckets); lower accumulate, raise batch_size, or "
            "prepare with a smaller --rows-per-group",
            "invalid_config",
        )


class Plan:
    """The steps of a run: `plan[t]` is the `PlanStep` of global step t."""

    def __init__(self, manifest: dict[str, Any], recipe: Recipe, world_size: int = 1):
        """`recipe.buckets` must be resolved to sizes (`buckets.with_sizes`)."""
        assert not isinstance(recipe.buckets, BucketRange), "buckets are resolved with the model's grid first"
        self.recipe = recipe
        self.buckets = tuple(recipe.buckets or ())
        self.parts_per_step = batch_parts(manifest, recipe, world_size)
        self._pools: dict[_Pool, list[RowGroup]] = {}  # eligible row groups
        self._streams: dict[_Pool, BucketStream] = {}
        self._draws: list[np.ndarray] = []  # stage -> step -> group
        self._uses: list[np.ndarray] = []  # stage -> step -> number of earlier draws of the same pool
        seen: dict[_Pool, int] = {}
        for index, stage in enumerate(recipe.stages):
            check_micro_steps(stage, self.parts_per_step, world_size)
            for group in stage.groups:
                if _pool(group) not in self._pools:
                    self._add_pool(manifest, _pool(group))
            weights = np.array([group.weight for group in stage.groups])
            rng = np.random.default_rng((recipe.seed, 1, index))
            draws = rng.choice(len(stage.groups), size=stage.steps, p=weights / weights.sum())
            uses = np.zeros(stage.steps, np.int64)
            for g, group in enumerate(stage.groups):
                mine = draws == g
                uses[mine] = seen.get(_pool(group), 0) + np.arange(mine.sum())
                seen[_pool(group)] = seen.get(_pool(group), 0) + int(mine.sum())
            self._draws.append(draws)
            self._uses.append(uses)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.recipe.total_steps

    def __getitem__(self, step: int) -> PlanStep:
        """The plan of global step `step`."""
        stage, local = self.recipe.at(step)
        group = int(self._draws[stage][local])
        drawn, number = _pool(self.recipe.stages[stage].groups[group]), int(self._uses[stage][local])
        if drawn in self._streams:
            bucket, rows = self._streams[drawn].batch(number)
            return PlanStep(step, stage, group, tuple((file, index, (row,)) for file, index, row in rows), bucket)
        pool = self._pools[drawn]
        positions = range(number * self.parts_per_step, (number + 1) * self.parts_per_step)
        parts = tuple(pool[self._order(len(pool), i // len(pool))[i % len(pool)]] for i in positions)
        return PlanStep(step, stage, group, parts, self.buckets[0] if self.buckets else None)

    @property
    def used_buckets(self) -> tuple[Size, ...]:
        """The buckets in use, if there are several; one that would not fill a batch is dropped (`buckets.assign`)."""
        used = {bucket for stream in self._streams.values() for bucket in stream.buckets}
        return tuple(bucket for bucket in self.buckets if bucket in used)

    def _add_pool(self, manifest: dict[str, Any], wanted: _Pool) -> None:
        self._pools[wanted] = pool = _eligible(manifest, *wanted)
        if len(self.buckets) > 1:
            groups = {(f["path"], i): group for f in manifest["files"] for i, group in enumerate(f["row_groups"])}
            sizes = [row_sizes(groups[file, index]) for file, index, _ in pool]
            order = partial(self._order, len(pool))
            self._streams[wanted] = BucketStream(pool, sizes, self.buckets, self.recipe.batch_size, order)

    def _order(self, size: int, epoch: int) -> np.ndarray:
        """The order in which `size` row groups are read in an epoch."""
        if (size, epoch) not in self._orders:
            self._orders[size, epoch] = np.random.default_rng((self.recipe.seed, 2, size, epoch)).permutation(size)
        return self._orders[size, epoch]


def _pool(group: TaskGroup) -> _Pool:
    return group.tasks, group.text_only


def _eligible(manifest: dict[str, Any], tasks: tuple[str, ...], text_only: bool) -> list[RowGroup]:
    """Row groups with at least one annotation for one of the tasks, of rows without image if `text_only`. Raises
    `UserError` if there are none."""
    found = [
        (file["path"], index, group["rows"])
        for file in manifest["files"]
        for index, group in enumerate(file["row_groups"])
        if any(group["tasks"].get(get_task(task).annotation, 0) for task in tasks)
        and not (text_only and any(row_sizes(group)))
    ]
    if not found:
        if text_only:
            raise UserError(
                f"the shards have no row groups of text alone with {', '.join(tasks)}; join them with such ones, e.g. "
                "of 'lumen-ray prepare chat'",
                "no_annotations",
            )
        have = sorted({t for f in manifest["files"] for g in f["row_groups"] for t in g["tasks"]})
        raise UserError(
            f"the shards have no annotations for {', '.join(tasks)}; they have: {', '.join(have)}", "no_annotations"
        )
    return found


def row_rng(seed: int, step: int, file: str, index: int, row: int) -> np.random.Generator:
    """The generator of one row in one step: independent of rank, worker count and batch composition."""
    key = [ord(c) for c in file[-16:]]
    return np.random.default_rng((seed, 3, step, index, row, *key))
