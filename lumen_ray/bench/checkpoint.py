"""Steps in which a checkpoint is saved, in the background and not, against usual ones, by one trainer in one process.

A turn has usual steps, a step with a save in the background, steps while it is written, and a step with a save that
training waits for. All steps repeat one batch. The first turn is not timed: its save allocates the buffer of the copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lumen_ray import config
from lumen_ray.bench.timing import Result
from lumen_ray.bench.workload import check_batches, make_recipe, plan_of, scene_shards
from lumen_ray.data import files
from lumen_ray.data.batches.feed import plan_items
from lumen_ray.model.build import count_parameters
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.train.launch import prepare_job
from lumen_ray.train.new_tokens import RowMask
from lumen_ray.train.optimizer import build_optimizer, set_trainable
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.saver import Saver
from lumen_ray.train.trainer import Trainer, reproducible

AIM = 1 / 1.2  # of the rate of usual steps
BATCH_SIZE = 8
USUAL = 3  # usual steps a turn
MOST = 50  # steps in flight a turn


class Steps:
    """Optimizer steps of one trainer over one batch, and saves behind them."""

    def __init__(self, folder: Path, preset: str, batch_size: int):
        side = config.load(ModelSettings, model_path(preset)).image_size
        shards = scene_shards(folder / "scenes", 2 * batch_size, side)
        prepared = prepare_job(shards, make_recipe(1, model=preset, batch_size=batch_size), folder / "run")
        recipe = prepared.job.recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trainer = Trainer(prepared.job, self.device)
        self.batch = prepared.reader(plan_items(plan_of(prepared.manifest, recipe), 0, 1, 0)[0])
        (self.stage,) = recipe.stages
        set_trainable(self.trainer.model, self.stage)
        self.trainer.model.train()
        self.trainer.row_mask = RowMask(self.trainer.model)
        self.optimizer = build_optimizer(self.trainer.model, self.stage)
        self.background = self.trainer.saver
        self.waiting = Saver(self.trainer.files, recipe.model_copy(update={"async_checkpoints": False}), self.device)

    def step(self, saver: Saver | None = None) -> float:
        """Seconds of a step, with a save behind it if there is a saver."""
        started = time.perf_counter()
        batch = replace(self.batch, step=self.trainer.step)
        self.trainer._step(self.stage, 0, iter([batch]), self.optimizer)
        if saver:
            self.trainer.step += 1
            position = {"step": self.trainer.step, "stage": self.stage.name, "preset": ""}
            saver.save(position, self.trainer.model, self.optimizer)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def turn(self) -> dict[str, float]:
        """Seconds of a usual step, of steps with a save of either kind, and of those while one is written."""
        usual = statistics.median(self.step() for _ in range(USUAL))
        started = time.perf_counter()
        background = self.step(self.background)
        during: list[float] = []
        while not self.background.is_idle and len(during) < MOST:
            during.append(self.step())
        self.background.wait()
        took = time.perf_counter() - started
        return {
            "usual": usual,
            "background": background,
            "waiting": self.step(self.waiting),
            "step_while_written": statistics.mean(during or [usual]),
            "steps_while_written": len(during),
            "seconds_a_save": took - usual * (1 + len(during)),
        }


def bench(folder: Path, preset: str = "small", *, batch_size: int = BATCH_SIZE, turns: int = 5) -> Iterator[Result]:
    """Steps per minute, with a save and without, for saves in the background and for others."""
    steps = Steps(folder, preset, batch_size)
    with reproducible(steps.device):
        steps.turn()
        measured = [steps.turn() for _ in range(turns)]
    newest = checkpoint.complete(steps.trainer.files.location)[-1]
    details = {
        "preset": preset,
        "batch_size": batch_size,
        "parameters": count_parameters(steps.trainer.model),
        "checkpoint_bytes": sum(files.sizes(newest).values()),
        "device": str(steps.device),
        **{name: statistics.median(m[name] for m in measured) for name in measured[0]},
    }
    for name, kind, aim in (("checkpoint", "background", AIM), ("checkpoint, training waits", "waiting", None)):
        rates = {"with a save": [60 / m[kind] for m in measured], "usual": [60 / m["usual"] for m in measured]}
        yield Result(name, "steps/min", rates, aim, details=details)


def check(preset: str, batch_size: int = BATCH_SIZE) -> None:
    """Raises `UserError` for an unknown preset, and for batches that cannot be made."""
    model_path(preset)
    check_batches(None, batch_size, 1)
