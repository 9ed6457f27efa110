"""`lumen-ray train` (Ray Data feeding Ray Train) against a bare torch loop over the same batches held in memory.

Model, weights, steps, threads and number of processes are the same, and so are the losses, which is checked. The bare
loop reads nothing, so a core must be left for reading: on two cores one worker trains with one thread.

The first and the last steps of both sides are not timed: by the last, Ray Data may have read everything and would cost
nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
from pathlib import Path
from typing import Any

from lumen_ray.bench.bare import BareRun
from lumen_ray.bench.bare import run as run_bare
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.bench.workload import check_batches, make_recipe, plan_of, scene_shards
from lumen_ray.data.batches.feed import STEPS_PER_BLOCK, plan_items
from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import PreparedRun, prepare_job, train

AIM = 0.95
BATCH_SIZE = 16
WARM = 24  # steps at the start, not timed
COOL = 2 * STEPS_PER_BLOCK  # steps at the end, not timed
STEPS = WARM + 48 + COOL
LOSS_DIGITS = 5  # metrics.jsonl rounds to six


def check(
    shards: str | Path | None = None, *, steps: int | None = None, batch_size: int = BATCH_SIZE, workers: int = 1
) -> None:
    """Raises `UserError` for options that `bench` cannot run with."""
    if steps is not None and steps <= WARM + COOL:
        raise UserError(
            f"--steps {steps} is too few: the pipeline bench does not count the first {WARM} steps and the last "
            f"{COOL}; give {WARM + COOL + 1} or more",
            "invalid_option",
        )
    check_batches(shards, batch_size, workers)


def bench(
    folder: Path,
    shards: str | Path | None = None,
    *,
    model: str = "nano",
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    workers: int = 1,
    threads: int | None = None,
    turns: int = 2,
    images: int = 256,
) -> Result:
    """Samples per second of both sides after warm-up, over `shards` or over rendered scenes."""
    from lumen_ray import config
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.presets import model_path

    check(shards, steps=steps, batch_size=batch_size, workers=workers)
    cores = os.cpu_count() or 1
    threads = threads or max(1, cores // workers - 1)
    side = config.load(ModelSettings, model_path(model)).image_size
    shards = shards or scene_shards(folder / "scenes", images, side)
    recipe = make_recipe(steps, model=model, batch_size=batch_size, workers=workers)
    prepared = prepare_job(shards, recipe, folder / "batches")
    bare = BareRun(
        recipe, prepared.job.start.settings, len(prepared.job.start.tokenizer), threads,
        batch_files(prepared, folder), folder / "bare.pickle",
    )  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {"ray": [], "bare": []}

    def on_ray() -> float:
        run = folder / f"run-{len(runs['ray'])}"
        lines = trained_lines(shards, recipe, run, threads)
        runs["ray"].append({"losses": [line["loss"] for line in lines], "waits": [line["data_wait"] for line in lines]})
        return rate([line["time"] for line in lines], WARM, COOL, batch_size)

    def in_memory() -> float:
        times, losses = run_bare(bare)
        runs["bare"].append({"losses": losses})
        return rate(times, WARM, COOL, batch_size)

    rates = in_turns({"Ray Data + Ray Train": on_ray, "bare loop": in_memory}, turns)
    for ours, bare_run in zip(runs["ray"], runs["bare"], strict=True):
        check_losses(ours["losses"], bare_run["losses"])
    waiting = statistics.median(w for r in runs["ray"] for w in r["waits"][WARM : steps - COOL])
    return Result(
        "pipeline",
        "samples/s",
        rates,
        AIM,
        equal=f"the losses of all {steps} steps to {LOSS_DIGITS} digits",
        budget=f"{workers} training processes of {threads} threads on each side, on {cores} cores",
        details={
            "model": model,
            "batch_size": batch_size,
            "steps": steps,
            "untimed_steps": WARM + COOL,
            "data_wait": waiting,
        },
    )


def batch_files(prepared: PreparedRun, folder: Path) -> list[Path]:
    """Writes the batches of every step, pickled, to one file per rank."""
    recipe = prepared.job.recipe
    files: list[Path] = []
    plan = plan_of(prepared.manifest, recipe)
    for rank in range(recipe.workers):
        batches = [prepared.reader(item) for item in plan_items(plan, rank, recipe.workers)]
        files.append(folder / f"batches-{rank}.pickle")
        files[-1].write_bytes(pickle.dumps([pickle.dumps(batch, protocol=5) for batch in batches]))
    return files


def trained_lines(shards: str | Path, recipe: Recipe, run: Path, threads: int) -> list[dict[str, Any]]:
    """Trains on Ray and returns the lines of `metrics.jsonl`."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        train(shards, recipe, run)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rate(times: list[float], warm: int, cool: int, batch_size: int) -> float:
    """Samples per second without the first `warm` and the last `cool` steps; `times`: of the end of each step."""
    timed = times[warm - 1 : len(times) - cool]
    return (len(timed) - 1) * batch_size / (timed[-1] - timed[0])


def check_losses(one: list[float], other: list[float]) -> None:
    """Raises `SidesDiffer` at the first step whose losses differ, relative to the loss where that is above 1."""
    if len(one) != len(other):
        raise SidesDiffer(f"one side made {len(one)} steps, the other {len(other)}")
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        if not abs(a - b) / max(1.0, abs(b)) < 10**-LOSS_DIGITS:
            raise SidesDiffer(f"the losses of the two sides differ from step {step} on: {a:.6f} and {b:.6f}")
