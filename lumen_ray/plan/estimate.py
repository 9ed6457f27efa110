"""From the simulated pipeline to the whole job: its time, what each stage is busy with, and the bottleneck.

A short job is simulated whole. Of a long one, windows are: all actors at work on tasks of 1, 4, 16 and 64 fragments,
the sizes that tasks grow through. The time per image between these sizes is interpolated over the inverse of the size,
by which costs per task are spread. At most `MOST_ACTORS` actors are simulated, with their share of driver, lister and
storage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lumen_ray.label.runs import MOST_PER_TASK, task_size
from lumen_ray.plan.pipeline import FRAGMENT, Cluster, Mark, Pipeline
from lumen_ray.plan.times import STAGES, StageTimes

#: batches up to which a job is simulated whole
WHOLE = 40_000
MOST_ACTORS = 64
SIZES = (1, 4, 16, 64)  # fragments of a task in the windows
_WHAT_IF_ACTORS = 16
#: a stage is not the bottleneck if twice its speed gains less than this
_LEAST_GAIN = 1.01


@dataclass(frozen=True)
class Window:
    """A part of the job with all actors at work. busy: share of its time or capacity that each stage, the storage and
    the actors' cores are in use, 0..1."""

    images_per_second: float
    busy: dict[str, float]


@dataclass(frozen=True)
class Duration:
    """start_s, label_s, finish_s: seconds until the first actor has its first task, until all images are labelled, and
    until the summary is written. is_whole: the job was simulated whole."""

    start_s: float
    label_s: float
    finish_s: float
    is_whole: bool

    @property
    def seconds(self) -> float:
        return self.start_s + self.label_s + self.finish_s


@dataclass(frozen=True)
class Estimate:
    """window: the job once it is under way. gains: stage -> rate with this stage twice as fast, relative to the rate.
    bottleneck: a stage, "start" or "finishing"."""

    took: Duration
    window: Window
    gains: dict[str, float]
    bottleneck: str


def estimate(cluster: Cluster, times: StageTimes, images: int, image_bytes: float, seed: int = 0) -> Estimate:
    """Simulates labelling `images` images of `image_bytes` bytes each. Equal seeds give equal results."""
    took = duration(cluster, times, images, image_bytes, seed)
    size = task_size(_tasks(images) - 1)
    last = window(cluster, times, image_bytes, size, seed)
    gains = _gains(cluster, times, image_bytes, size, seed)
    bottleneck = max(gains, key=lambda stage: (gains[stage], last.busy[stage]))
    if gains[bottleneck] < _LEAST_GAIN:
        bottleneck = max(STAGES, key=lambda stage: last.busy[stage])
    if max(took.start_s, took.finish_s) > took.label_s:
        bottleneck = "start" if took.start_s > took.finish_s else "finishing"
    return Estimate(took, last, gains, bottleneck)


def duration(cluster: Cluster, times: StageTimes, images: int, image_bytes: float, seed: int = 0) -> Duration:
    """How long a job takes."""
    start, up = times.ray_start_s, max(times.start.samples)
    finish = times.finishing.mean * math.ceil(images / FRAGMENT)
    if images / min(times.batch_size, FRAGMENT) <= WHOLE:
        whole = Pipeline(cluster, times, image_bytes, images=images, seed=seed).run_to_end()
        up = min(whole, up)
        return Duration(start + up, whole - up, finish, True)
    rates = {size: window(cluster, times, image_bytes, size, seed).images_per_second for size in SIZES}
    label = _spread(images, {size: 1 / rate for size, rate in rates.items()}) / availability(cluster, times)
    return Duration(start + up, label, finish, False)


def window(cluster: Cluster, times: StageTimes, image_bytes: float, size: int, seed: int = 0) -> Window:
    """The rate with all actors at work on tasks of `size` fragments: of every actor a task, after a task before it."""
    part, share = cluster.share(MOST_ACTORS)
    return _window(part, share, times, image_bytes, size, seed)


def _window(part: Cluster, share: float, times: StageTimes, image_bytes: float, size: int, seed: int) -> Window:
    pipeline = Pipeline(part, times, image_bytes, fragments=size, is_warm=True, shared=share, seed=seed)
    each = max(1, 8 // size)  # tasks of an actor, more of short ones
    before = pipeline.run_to_task(part.actors * each)
    after = pipeline.run_to_task(2 * part.actors * each)
    while after.images - before.images < FRAGMENT * part.actors:  # many tasks may end at once
        after = pipeline.run_to_task(after.tasks + part.actors)
    return _between(before, after, part, share)


def _between(before: Mark, after: Mark, part: Cluster, share: float) -> Window:
    seconds = after.now - before.now
    spent = after.spent.copy()
    spent.subtract(before.spent)
    nodes = math.ceil(part.actors / part.actors_per_node)
    capacity = dict.fromkeys(("reading", "decoding", "model", "publishing"), part.actors) | {"listing": 1, "driver": 1}
    busy = {stage: spent[stage] / (capacity[stage] * seconds) for stage in STAGES}
    busy["storage"] = spent["storage"] / (part.storage * seconds)
    busy["cores"] = spent["cores"] / (nodes * part.cores * seconds)
    rate = (after.images - before.images) / seconds
    return Window(rate / share, {name: min(1.0, max(0.0, value)) for name, value in busy.items()})


def _tasks(images: int) -> int:
    """The number of tasks of a job."""
    fragments, number = math.ceil(images / FRAGMENT), 0
    while fragments > 0 and task_size(number) < MOST_PER_TASK:
        fragments, number = fragments - task_size(number), number + 1
    return number + math.ceil(max(0, fragments) / MOST_PER_TASK)


def _spread(images: int, per_image: dict[int, float]) -> float:
    """Seconds of all tasks, from the seconds per image with tasks of some sizes."""
    inverse = sorted((1 / size, seconds) for size, seconds in per_image.items())
    xs, ys = zip(*inverse, strict=True)
    fragments, number, total = math.ceil(images / FRAGMENT), 0, 0.0
    while fragments > 0 and task_size(number) < MOST_PER_TASK:
        size = min(task_size(number), fragments)
        total += size * FRAGMENT * float(np.interp(1 / task_size(number), xs, ys))
        fragments, number = fragments - size, number + 1
    return total + max(0, fragments) * FRAGMENT * ys[0]


def availability(cluster: Cluster, times: StageTimes) -> float:
    """The share of the actors that are at work where nodes are lost and replaced: each loss costs the actors of a node
    the time until they are back, and half a fragment."""
    if not cluster.losses_per_hour:
        return 1.0
    nodes = math.ceil(cluster.actors / cluster.actors_per_node)
    redone = times.model.mean * FRAGMENT / times.batch_size / 2
    between = 3600 * nodes / cluster.losses_per_hour  # seconds between losses of one node
    return between / (between + cluster.replace_s + times.start.mean + redone)


def _gains(cluster: Cluster, times: StageTimes, image_bytes: float, size: int, seed: int) -> dict[str, float]:
    """The rate with each stage twice as fast, relative to the rate, on a few of the actors."""
    part, share = cluster.share(_WHAT_IF_ACTORS)

    def rate(times: StageTimes, storage: float = 1.0) -> float:
        faster = replace(part, storage=part.storage * storage, link=part.link * storage)
        return _window(faster, share, times, image_bytes, size, seed).images_per_second

    now = rate(times)
    return {stage: rate(times.faster(stage, 2), 2.0 if stage == "reading" else 1.0) / now for stage in STAGES}
