"""Training steps of expert detectors on a frozen trunk: with its features, which are kept, against a backbone of their
own beside a trunk that runs in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lumen_ray import config
from lumen_ray.bench.timing import Result, in_turns
from lumen_ray.data.batches.feed import plan_items
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.presets import recipe_path
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import PreparedRun, prepare_job
from lumen_ray.train.trainer import Trainer

KEPT = "nano-places"  # the recipe whose stages train an expert each, with `cache_trunk`
RUN = ("nano-experts", "decoders")  # recipe and stage that train all of them
AIM = 3.0
IMAGES = 64  # few enough to be seen twice in a turn


def bench(folder: Path, turns: int = 3, batch_size: int = 16) -> Iterator[Result]:
    """Steps per second of CPU time, reading of the batches included. In every turn a side sees the scenes twice, and
    the second time counts: with `cache_trunk` what came the first time is kept."""
    prepare_source(folder / "scenes", ScenesSource(IMAGES, edits=True), rows_per_group=8, workers=0)
    for stage in config.load_yaml(recipe_path(KEPT))["stages"]:
        (decoder,) = {name for group in stage["groups"] for name in group["decoders"]}
        whole = {"kept": (KEPT, stage["name"]), "run": RUN}
        sides = {side: _rate(folder, decoder, *place, batch_size) for side, place in whole.items()}
        yield Result(
            f"frozen_trunk/{decoder}", "steps/CPU s", in_turns(sides, turns), aim=AIM,
            budget=f"{torch.get_num_threads()} threads", details={"images_per_step": batch_size, "sides": whole},
            note="the sides differ in preset and stage",
        )  # fmt: skip


def _rate(folder: Path, decoder: str, recipe: str, name: str, batch_size: int) -> Callable[[], float]:
    """Measures steps per second of CPU time on new runs of the stage `name`, cut to two rounds of the scenes and to the
    groups that train the decoder."""
    data = config.load_yaml(recipe_path(recipe))
    (stage,) = (stage for stage in data["stages"] if stage["name"] == name)
    groups = [group for group in stage["groups"] if group.get("decoders") == [decoder]]
    stages = [stage | {"groups": groups, "steps": 2 * IMAGES // batch_size, "warmup_steps": 0}]
    numbers = iter(range(10**6))

    def measure() -> float:
        run = folder / f"{decoder}-{recipe}-{next(numbers)}"
        changed = {"stages": stages, "batch_size": batch_size, "workers": 1, "checkpoint_every": 0}
        return _second_round(prepare_job(folder / "scenes", _recipe(data | changed), run))

    return measure


def _recipe(data: dict[str, Any]) -> Recipe:
    return config.validate(Recipe, data, data["name"])


def _second_round(job: PreparedRun) -> float:
    """Trains in this process; the rate of the second half of the steps, without the last, which ends the run."""
    steps = job.job.recipe.total_steps
    marks: list[float] = []
    trainer = Trainer(job.job, torch.device("cpu"))
    items = plan_items(Plan(job.manifest, job.job.recipe), 0, 1)

    def batches() -> Iterator[Any]:
        for item in items:
            marks.append(time.process_time())
            yield job.reader(item)

    trainer.fit(batches())
    return (steps - steps // 2 - 1) / (marks[-1] - marks[steps // 2])
