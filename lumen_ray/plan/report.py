"""The plan of a labelling job: its time, needs and cost as a table, as JSON, and in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from rich.table import Table

from lumen_ray.console import console, say
from lumen_ray.console import seconds as as_time
from lumen_ray.errors import UserError
from lumen_ray.plan.estimate import MOST_ACTORS, Estimate, duration, estimate
from lumen_ray.plan.pipeline import FRAGMENT, Cluster
from lumen_ray.plan.settings import LabelJob
from lumen_ray.plan.times import STAGES, Source, StageTimes
from lumen_ray.plan.work import ModelWork

#: bytes of a process of Ray without a model, and of an actor's with torch, without and with CUDA's libraries: assumed
PROCESS, ACTOR, CUDA_ACTOR = 0.5e9, 1.0e9, 3.0e9
_PER = {
    "listing": "image", "reading": "image", "decoding": "image", "model": "batch", "publishing": "fragment",
    "start": "actor", "finishing": "fragment",
}  # fmt: skip


@dataclass(frozen=True)
class PlanReport:
    """A planned job. `found`: see `Estimate`."""

    job: LabelJob
    times: StageTimes
    work: ModelWork
    cluster: Cluster
    found: Estimate

    @property
    def hours(self) -> float:
        return self.found.took.seconds / 3600

    @property
    def cost(self) -> float | None:
        """US dollars; None where no price was given."""
        if self.job.usd_per_hour is None:
            return None
        return self.hours * self.job.usd_per_hour * max(1, self.job.gpus)

    @property
    def cpus_wanted(self) -> float:
        return cpus_wanted(self.times, on_gpu=bool(self.job.gpus))

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by role."""
        work, job = self.work, self.job
        pixels = min(job.megapixels * 1e6, work.longest_side**2)
        batches = 2 * self.times.batch_size * (pixels * 3 + job.image_mb * 1e6)
        roles = {
            "driver": PROCESS + 64 * job.images / FRAGMENT,  # numbers of finished fragments, where a job resumes
            "lister": PROCESS + 2 * 16 * job.images,  # hashes of ids and places, twice while they are merged
            "actor": (CUDA_ACTOR if job.gpus else ACTOR) + batches,
        }
        on_device = work.memory(self.times.batch_size, job.dtype)
        if job.gpus:
            return roles | {"GPU": sum(on_device.values())}
        roles["actor"] += sum(on_device.values()) - on_device["CUDA"]
        return roles

    @property
    def bandwidth(self) -> float:
        """Bytes per second of images that are read, of all actors."""
        return self.found.window.images_per_second * self.job.image_mb * 1e6

    def sentence(self) -> str:
        """The bottleneck and what to change."""
        found, job, times = self.found, self.job, self.times
        name = found.bottleneck
        gain = f" (twice as fast would give {found.gains[name]:.2f} times the rate)" if name in found.gains else ""
        return f"Bottleneck: {name}{gain}; {_advice(name, job, times, self)}."

    def to_json(self) -> dict[str, Any]:
        found, job, took = self.found, self.job, self.found.took
        return {
            "images": job.images,
            "actors": job.num_actors,
            "seconds": {
                "start": found.took.start_s,
                "label": found.took.label_s,
                "finish": found.took.finish_s,
                "all": found.took.seconds,
            },
            "images_per_second": found.window.images_per_second,
            "images_per_second_overall": job.images / took.seconds,
            "bottleneck": found.bottleneck,
            "sentence": self.sentence(),
            "stages": {
                name: {"seconds": stage.mean, "source": stage.source, "note": stage.note}
                for name, stage in self.times.stages.items()
            },
            "busy": found.window.busy,
            "gains": found.gains,
            "cpus_per_actor_wanted": self.cpus_wanted,
            "memory_bytes": self.memory,
            "read_bytes_per_second": self.bandwidth,
            "storage_bytes_per_second": job.storage,
            "gpu_hours": self.hours * job.gpus,
            "usd": self.cost,
            "simulated": "the whole job" if took.is_whole else "windows of the job",
        }


def cpus_wanted(times: StageTimes, on_gpu: bool) -> float:
    """CPUs per actor that keep the model busy all the time."""
    of_image = times.decoding.mean + times.publishing.mean / FRAGMENT
    alone = times.model.mean if on_gpu else times.model.mean / times.model_cores
    return times.model_cores + of_image * times.batch_size / alone


def plan_label(job: LabelJob, times: StageTimes, work: ModelWork) -> PlanReport:
    """Simulates a job (see `estimate`)."""
    cluster = cluster_of(job)
    return PlanReport(job, times, work, cluster, estimate(cluster, times, job.images, job.image_mb * 1e6, job.seed))


def cluster_of(job: LabelJob) -> Cluster:
    per_node = min(job.gpus_per_node, job.gpus) if job.gpus else job.actors
    return Cluster(
        actors=job.num_actors,
        actors_per_node=per_node,
        cores=job.cpus_per_gpu * per_node if job.gpus else job.cores,
        threads=job.threads,
        storage=math.inf if job.storage is None else job.storage,
        on_one_machine=not job.gpus,
        losses_per_hour=job.losses_per_hour,
    )


def fewest_gpus(job: LabelJob, times: StageTimes, hours: float) -> LabelJob:
    """The job on the fewest GPUs, to within 5 %, on which it takes no longer than `hours`.

    Raises `UserError` if no number of GPUs is enough, since something else is at its limit.
    """

    def seconds(gpus: int) -> float:
        cluster = cluster_of(replace(job, gpus=gpus))
        return duration(cluster, times, job.images, job.image_mb * 1e6, job.seed).seconds

    most, took = 1, seconds(1)
    while took > hours * 3600:
        before, most = took, 2 * most
        took = seconds(most)
        if took > hours * 3600 and took > 0.95 * before:
            raise UserError(
                f"no number of GPUs labels {job.images:,} images within {hours:g} hours: on {most} GPUs the job takes "
                f"{took / 3600:.1f} hours, and more make it no shorter; give more hours, or --gpus {most} to see why",
                "too_little_time",
            )
    few = most // 2
    while most - few > max(1, most // 20):
        middle = (few + most) // 2
        few, most = (few, middle) if seconds(middle) <= hours * 3600 else (middle, most)
    return replace(job, gpus=most)


def _advice(name: str, job: LabelJob, times: StageTimes, report: PlanReport) -> str:
    wanted = math.ceil(report.cpus_wanted)
    has_cores = report.found.window.busy["cores"] < 0.9
    if name == "decoding" and job.gpus and has_cores:
        return (
            f"each actor decodes with {job.threads} threads: store the images smaller, or as JPEG, which is decoded at "
            "reduced scale"
        )
    texts = {
        "listing": "one process lists the input: give a Parquet table of paths, or split the input into several jobs",
        "reading": "raise the store's bandwidth, keep the images near the cluster, or store them smaller",
        "decoding": f"give about {wanted} CPUs for each {'GPU' if job.gpus else 'actor'}, or store the images smaller",
        "model": "give more or faster GPUs, or ask for fewer tasks and classes"
        if job.gpus
        else "give more cores or a GPU, or ask for fewer tasks and classes",
        "publishing": "write the labels to a faster store, and nearer to the cluster",
        "driver": "split the input into several jobs, each with a driver of its own",
        "start": "the job is too short for its cluster: give fewer actors, or join it with others",
        "finishing": "write the labels to a file system, where reading the ledger at the end takes less, or split the "
        "input into several jobs",
    }
    if name == "model" and job.gpus and job.dtype == "float32" and times.model.source == "computed":
        return f"use --dtype bfloat16, {texts[name]}"
    return texts[name]


def print_report(report: PlanReport) -> None:
    """Prints the plan: stages as a table, where their times come from, totals, and the bottleneck."""
    job, found = report.job, report.found
    where = f"{job.gpus} GPUs" + (f" ({job.gpu.name})" if job.gpu else "") if job.gpus else f"{job.actors} actors"
    tasks = ",".join(job.tasks)
    say(f"label {job.images:,} images, '{report.work.preset}', {tasks}, {job.num_classes} classes, on {where}")
    table = Table("stage", "time", "per", "source", "busy", "twice as fast", box=None, pad_edge=False)
    for name, stage in report.times.stages.items():
        is_stage = name in STAGES
        busy, gain = (f"{found.window.busy[name]:.0%}", f"x{found.gains[name]:.2f}") if is_stage else ("", "")
        per = _PER.get(name, "task")
        per = f"{per} of {report.times.batch_size}" if per == "batch" else per
        table.add_row(name, with_unit(stage.mean), per, stage.source, busy, gain)
    console.print(table)
    for source in get_args(Source):
        notes = [f"{name} ({s.note})" for name, s in report.times.stages.items() if s.source == source and s.note]
        if notes:
            say(f"{source}: {', '.join(notes)}")
    for name, value in _totals(report):
        say(f"{name:<13} {value}")
    say(report.sentence())


def _totals(report: PlanReport) -> list[tuple[str, str]]:
    job, found, took = report.job, report.found, report.found.took
    rate = found.window.images_per_second
    parts = f"start {as_time(took.start_s)}, labelling {as_time(took.label_s)}, finishing {as_time(took.finish_s)}"
    each = f"{rate / job.num_actors:,.1f} by each {'GPU' if job.gpus else 'actor'}"
    unit = "GPU" if job.gpus else "actor"
    given = job.cpus_per_gpu if job.gpus else job.cores / job.actors
    storage = "" if job.storage is None else f", of {job.storage / 1e9:,.2f} GB/s"
    rows = [
        ("time", f"{as_time(took.seconds)} ({parts})"),
        ("rate", f"{rate:,.0f} images/s once under way, {each}"),
        (f"CPUs per {unit}", f"{report.cpus_wanted:.1f} keep the model busy; {given:g} given"),
        ("memory", ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in report.memory.items())),
        ("storage", f"{report.bandwidth / 1e9:,.2f} GB/s{storage}, {job.images * job.image_mb / 1e6:,.1f} TB in all"),
    ]
    if job.gpus:
        rows.append(("GPU hours", f"{report.hours * job.gpus:,.0f}"))
    if report.cost is not None:
        rows.append(("cost", f"{report.cost:,.0f} USD"))
    if job.losses_per_hour:
        rows.append(("lost nodes", f"{job.losses_per_hour * report.hours:,.0f} expected"))
    whole = "the whole job" if took.is_whole else "parts of the job, extrapolated"
    some = f", {MOST_ACTORS} of the actors" if job.num_actors > MOST_ACTORS and not took.is_whole else ""
    rows.append(("simulated", whole + some))
    return rows


def with_unit(value: float) -> str:
    """Seconds with a unit: ``0.0123 -> "12.3 ms"``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"
