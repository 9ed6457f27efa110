"""The predictions of `lumen-ray plan` beside runs of `lumen-ray label` on the CPUs of this machine.

In every turn the stages are recorded anew, so that both see the machine in the same state.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lumen_ray.bench.json_worker import answer_once
from lumen_ray.bench.label import WORKER, write_scenes
from lumen_ray.bench.timing import Result
from lumen_ray.console import comma_separated
from lumen_ray.label.runs import task_size
from lumen_ray.plan.calibrate import calibrate
from lumen_ray.plan.pipeline import FRAGMENT
from lumen_ray.plan.report import PlanReport, plan_label
from lumen_ray.plan.settings import LabelJob, stage_times
from lumen_ray.presets import DEFAULT_MODEL

ACTORS = (1, 2)
PREDICTED, RUN = "predicted", "run"


def bench(
    folder: Path, *, model: str = DEFAULT_MODEL, turns: int = 3, images: int = 1024, tasks: str = "detect"
) -> Iterator[Result]:
    """Images per second with each number of actors: once the first fragment is labelled, of the whole job, and for a
    second of CPU time, which other programs on the machine disturb less. A ratio of 1 is a prediction that came
    true."""
    source = folder / "scenes"
    write_scenes(source, images, different=64)
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(turns):
        recording = calibrate(source, model=model, tasks=comma_separated(tasks))
        for actors in ACTORS:
            job = LabelJob.recorded(recording, images, actors)
            report = plan_label(job, stage_times(job, recording.model_work(), recording), recording.model_work())
            seen = _run(folder, model, source, tasks, actors, turn)
            name = f"{actors} actor{'s' if actors > 1 else ''}"
            rates = {
                name: (report.found.window.images_per_second, seen["images_per_second"]),
                f"{name}, whole job": (images / report.found.took.seconds, images / seen["job_seconds"]),
                f"{name}, by CPU time": (1 / _cpu(report), seen["cpu_images"] / seen["all_cpu"]),
            }
            for each, (predicted, measured) in rates.items():
                sides = found.setdefault(each, {PREDICTED: [], RUN: []})
                sides[PREDICTED].append(predicted)
                sides[RUN].append(measured)
    budget = f"{os.cpu_count()} cores"
    for name, sides in found.items():
        yield Result(name, "images/s", sides, budget=budget, details={"images": images, "model": model, "tasks": tasks})


def _cpu(report: PlanReport) -> float:
    """CPU seconds of an image, of all processes."""
    times, fragment = report.times, FRAGMENT
    of_task = (times.driver.mean + times.worker.mean) / task_size(0)
    of_fragment = (times.publishing.mean + of_task) / fragment
    return times.listing.mean + times.decoding.mean + times.model.mean / times.batch_size + of_fragment


def _run(folder: Path, model: str, source: Path, tasks: str, actors: int, turn: int) -> dict[str, float]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = folder / f"labels-{actors}-{turn}"
    command = [sys.executable, "-P", str(WORKER), model, str(source), str(output), tasks, str(actors)]
    return answer_once(f"label with {actors} actors", command, os.environ | {"PYTHONPATH": path}, folder)
