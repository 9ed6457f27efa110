"""What a labelling job is planned for: images, model, cluster and store; and what is assumed of stages not recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lumen_ray.errors import UserError
from lumen_ray.label.runs import THREADS_PER_GPU
from lumen_ray.label.workers import FETCHED_AT_ONCE
from lumen_ray.plan.gpus import Gpu
from lumen_ray.plan.recording import Recording
from lumen_ray.plan.times import Stage, StageTimes
from lumen_ray.structures import Dtype, check_dtype

if TYPE_CHECKING:
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.plan.work import ModelWork

_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
#: assumed where nothing was recorded: images in a bucket with 1000 names per answer; a request of 30 ms, 50 MB/s per
#: stream; 8 ms of a core per megapixel decoded at full scale; driver and Ray as measured on 2 CPU cores; 30 s for an
#: actor's process, and weights at 1 GB/s
LIST_S, REQUEST_S, STREAM = 1e-4, 0.03, 50e6
DECODE_S_PER_MEGAPIXEL, PUBLISH_S = 0.008, 0.01
DRIVER_S, WORKER_S, RAY_START_S = 0.007, 0.008, 20.0
START_S, WEIGHTS_PER_S = 30.0, 1e9
LEDGER_S = REQUEST_S / 32  # entries are read at the end, 32 at a time
MFU = 0.35  # share of the GPU's peak that passes of a batch reach
IMAGE_MB, MEGAPIXELS = 0.5, 2.0


@dataclass(frozen=True)
class LabelJob:
    """A labelling job to plan. gpus: on the cluster; 0: `actors` on the `cores` of one machine, without a GPU. gpu:
    their kind, by which the model's time is computed; None: as recorded.

    image_mb, megapixels: of a stored image. storage: bytes per second of the images' store; None: as much as is needed.
    usd_per_hour: of a GPU, or of the machine. mfu: see `ModelWork.seconds`.
    """

    images: int
    tasks: tuple[str, ...]
    num_classes: int
    image_mb: float = IMAGE_MB
    megapixels: float = MEGAPIXELS
    batch_size: int = 8
    dtype: Dtype = "bfloat16"
    gpus: int = 0
    gpu: Gpu | None = None
    cpus_per_gpu: float = 12.0
    gpus_per_node: int = 8
    actors: int = 0
    cores: int = 1
    storage: float | None = None
    usd_per_hour: float | None = None
    losses_per_hour: float = 0.0
    mfu: float = MFU
    seed: int = 0

    @classmethod
    def recorded(cls, recording: Recording, images: int, actors: int) -> LabelJob:
        """The job that was recorded, with other numbers, on the machine that it was recorded on."""
        return cls(
            images, tuple(recording.tasks), recording.num_classes, recording.image_bytes / 1e6, recording.megapixels,
            recording.batch_size, check_dtype(recording.dtype), actors=actors, cores=recording.cores,
        )  # fmt: skip

    @property
    def num_actors(self) -> int:
        return self.gpus or self.actors

    @property
    def threads(self) -> int:
        """Threads of an actor, as `label.runs.actor_resources` chooses them."""
        return THREADS_PER_GPU if self.gpus else max(1, self.cores // self.actors)


def parse_count(text: str) -> int:
    """``"100M" -> 100_000_000``; also k and B. Raises `UserError` for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text.replace(",", "").replace("_", ""))
    number = float(match[1]) * _MULTIPLES[match[2]] if match else 0.0
    if number < 1:
        raise UserError(f"--images is '{text}'; give a number such as 250000, 100k, 100M or 2B", "invalid_setting")
    return round(number)


def read_model(preset: str | None, model: str | None) -> ModelSettings:
    """The settings of a preset, or of a model folder. Raises `UserError` for unknown ones."""
    from lumen_ray import config
    from lumen_ray.model.settings import ModelSettings, read_settings
    from lumen_ray.presets import model_path

    return read_settings(model) if model else config.load(ModelSettings, model_path(preset or ""))


def check_memory(work: ModelWork, job: LabelJob) -> None:
    """Raises `UserError` if the model does not fit on the job's GPU."""
    if job.gpu is None:
        return
    needed = sum(work.memory(job.batch_size, job.dtype).values())
    if needed <= job.gpu.memory:
        return
    ways = ["a GPU with more memory (--gpu)"]
    if job.dtype == "float32" and sum(work.memory(job.batch_size, "bfloat16").values()) <= job.gpu.memory:
        ways.insert(0, "--dtype bfloat16")
    if job.batch_size > 1 and sum(work.memory(1, job.dtype).values()) <= job.gpu.memory:
        ways.insert(0, "a smaller --batch-size")
    raise UserError(
        f"preset '{work.preset}' needs about {needed / 1e9:.1f} GB on a GPU in {job.dtype} at batch size "
        f"{job.batch_size} and a {job.gpu.name} has {job.gpu.memory / 1e9:.0f} GB; give {' or '.join(ways)}",
        "too_little_memory",
    )


def stage_times(job: LabelJob, work: ModelWork, recording: Recording | None) -> StageTimes:
    """The stages of the job: recorded ones scaled to its images, else assumed ones. On a kind of GPU, `job.gpu`, the
    model's time is computed from its work; else it is the recorded one."""
    if job.gpu is None:
        assert recording is not None, "without a kind of GPU the model's time is recorded"
        return _scaled(recording, job)
    seconds = work.seconds(job.batch_size, job.gpu, job.dtype, job.mfu)
    note = f"FLOPs of '{work.preset}' at {job.mfu:.0%} of the peak of a {job.gpu.name} in {job.dtype}"
    model = Stage((seconds,), "computed", note)
    if recording is None:
        return _assumed(job, work, model)
    start = _start(work, job)
    return replace(_scaled(recording, job), model=model, start=start, batch_size=job.batch_size, model_cores=1.0)


def _start(work: ModelWork, job: LabelJob) -> Stage:
    from lumen_ray.plan.work import BYTES

    weights = work.parameters * BYTES[job.dtype]
    return Stage((START_S + weights / WEIGHTS_PER_S,), "assumed", f"{START_S:.0f} s, and weights at 1 GB/s")


def _assumed(job: LabelJob, work: ModelWork, model: Stage) -> StageTimes:
    size = job.image_mb * 1e6
    return StageTimes(
        listing=Stage((LIST_S,), "assumed", "a bucket"),
        reading=Stage((REQUEST_S + size / STREAM,), "assumed", f"30 ms and 50 MB/s, {FETCHED_AT_ONCE} at once"),
        decoding=Stage((DECODE_S_PER_MEGAPIXEL * job.megapixels,), "assumed", "8 ms per megapixel"),
        model=model,
        publishing=Stage((PUBLISH_S,), "assumed", "and 3 requests of 30 ms"),
        driver=Stage((DRIVER_S,), "assumed"),
        worker=Stage((WORKER_S,), "assumed"),
        start=_start(work, job),
        finishing=Stage((LEDGER_S,), "assumed", "ledger in a bucket"),
        batch_size=job.batch_size,
        read_at_once=FETCHED_AT_ONCE,
        request_s=REQUEST_S,
        ray_start_s=RAY_START_S,
    )


def _scaled(recording: Recording, job: LabelJob) -> StageTimes:
    """Recorded times for images of another size: reading goes by bytes, decoding by pixels."""
    times = recording.times(job.threads)
    pixels, size = job.megapixels / recording.megapixels, job.image_mb * 1e6 / recording.image_bytes
    changes = {
        name: getattr(times, name).scaled(factor, f"scaled by {factor:.3g} to these images")
        for name, factor in (("decoding", pixels), ("reading", size))
        if abs(factor - 1) > 0.01
    }
    return replace(times, **changes)
