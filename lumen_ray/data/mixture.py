"""The plan: which task group and which row groups step t trains, a pure function of (seed, t).

Every rank computes the same plan with no message, so no rank waits in a collective that another skips. Resuming means
to start the plan at step t; there is no list of consumed ids. Rows were shuffled once when the shards were written;
row groups are shuffled anew each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lumen_ray.errors import UserError
from lumen_ray.train.recipe import Recipe


@dataclass(frozen=True)
class PlanStep:
    """`parts`: the row groups (file, index, number of rows) of the global batch, in order."""

    step: int
    stage: int
    group: int
    parts: tuple[tuple[str, int, int], ...]

    def share(self, rank: int, world_size: int) -> tuple[tuple[str, int, int], ...]:
        """The row groups of one rank; all ranks' shares in rank order are the global batch."""
        size = len(self.parts) // world_size
        return self.parts[rank * size : (rank + 1) * size]


def batch_parts(manifest: dict[str, Any], recipe: Recipe, world_size: int) -> int:
    """Row groups per step; `UserError` when the batch cannot be made of whole row groups, evenly over the workers."""
    largest = max((g["rows"] for f in manifest["files"] for g in f["row_groups"]), default=0)
    if largest == 0:
        raise UserError("the shards hold no rows; prepare them again", "empty_shards")
    if recipe.batch_size % largest or (recipe.batch_size // largest) % world_size:
        raise UserError(
            f"batch_size {recipe.batch_size} must be a multiple of {largest} rows (a row group of the shards) times "
            f"{world_size} workers; change batch_size or workers, or prepare with another rows-per-group",
            "invalid_config",
        )
    return recipe.batch_size // largest


class Plan:
    def __init__(self, manifest: dict[str, Any], recipe: Recipe, world_size: int = 1):
        self.recipe = recipe
        self.parts_per_step = batch_parts(manifest, recipe, world_size)
        self._pools: list[list[list[tuple[str, int, int]]]] = []  # stage -> group -> eligible row groups
        self._draws: list[np.ndarray] = []  # stage -> step -> group
        self._uses: list[np.ndarray] = []  # stage -> step -> how often the same pool was drawn before
        seen: dict[tuple[str, ...], int] = {}
        for index, stage in enumerate(recipe.stages):
            self._pools.append([_eligible(manifest, group.tasks) for group in stage.groups])
            weights = np.array([group.weight for group in stage.groups])
            rng = np.random.default_rng((recipe.seed, 1, index))
            draws = rng.choice(len(stage.groups), size=stage.steps, p=weights / weights.sum())
            uses = np.zeros(stage.steps, np.int64)
            for g, group in enumerate(stage.groups):
                mine = draws == g
                uses[mine] = seen.get(group.tasks, 0) + np.arange(mine.sum())
                seen[group.tasks] = seen.get(group.tasks, 0) + int(mine.sum())
            self._draws.append(draws)
            self._uses.append(uses)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.recipe.total_steps

    def __getitem__(self, step: int) -> PlanStep:
        """The plan of one global step."""
        stage, local = self.recipe.at(step)
        group = int(self._draws[stage][local])
        pool = self._pools[stage][group]
        first = int(self._uses[stage][local]) * self.parts_per_step
        parts = tuple(pool[self._order(len(pool), i)] for i in range(first, first + self.parts_per_step))
        return PlanStep(step, stage, group, parts)

    def _order(self, size: int, position: int) -> int:
        """The `position`-th row group when `size` of them are read epoch after epoch, each in a new order."""
        epoch, place = divmod(position, size)
        if (size, epoch) not in self._orders:
            self._orders[size, epoch] = np.random.default_rng((self.recipe.seed, 2, size, epoch)).permutation(size)
        return int(self._orders[size, epoch][place])


def _eligible(manifest: dict[str, Any], tasks: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Row groups with at least one annotation for one of the tasks; `UserError` when there is none."""
    found = [
        (file["path"], index, group["rows"])
        for file in manifest["files"]
        for index, group in enumerate(file["row_groups"])
        if any(group["tasks"].get(task, 0) for task in tasks)
    ]
    if not found:
        have = sorted({t for f in manifest["files"] for g in f["row_groups"] for t in g["tasks"]})
        raise UserError(
            f"the shards have no annotations for {', '.join(tasks)}; they have: {', '.join(have)}", "no_annotations"
        )
    return found


def row_rng(seed: int, step: int, file: str, index: int, row: int) -> np.random.Generator:
    """The generator of one row in one step: independent of rank, worker count and batch composition."""
    key = [ord(c) for c in file[-16:]]
    return np.random.default_rng((seed, 3, step, index, row, *key))
