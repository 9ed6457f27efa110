"""Metrics of a run: one JSON line per step, and the same scalars for TensorBoard, MLflow and W&B."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from lumen_ray.data import files, urls
from lumen_ray.data.urls import Location
from lumen_ray.errors import UserError
from lumen_ray.model.build import Generalist
from lumen_ray.recipe import Recipe
from lumen_ray.train.losses import StepSums
from lumen_ray.train.metrics import flops, mlflow, wandb
from lumen_ray.train.metrics.prometheus import RunMetrics
from lumen_ray.trunk.batch import TrainingBatch

Progress = Callable[[dict[str, Any]], None]
#: between looks at metrics in a bucket
BUCKET_SECONDS = 5.0
FLUSH_SECONDS = 30.0  # between flushes of TensorBoard's file, in addition to those at checkpoints


class Meter:
    """Measures throughput over all ranks, and memory and utilisation of this rank."""

    def __init__(self, model: Generalist, precision: str, device: torch.device):
        self._model, self._device = model, device
        self._peak = flops.peak(device, precision)

    def metrics(self, batches: list[TrainingBatch], sums: StepSums, waited: float, busy: float) -> dict[str, float]:
        """Scalars of one step. `waited`, `busy`: seconds spent waiting for data and computing."""
        seconds = waited + busy
        values = {
            "samples_per_s": round(sums.images / seconds, 2),
            "tokens_per_s": round(sums.tokens / seconds, 1),
            "padding": round(1 - sums.tokens / sums.computed_tokens, 4),
            "data_wait": round(waited / seconds, 4),
            "memory_gb": round(peak_memory(self._device) / 1e9, 3),
        }
        if self._peak:
            counts = flops.of_step(self._model, batches)
            values["mfu"] = round(sum(counts.values()) / seconds / self._peak, 5)
            values |= {f"mfu/{name}": round(count / seconds / self._peak, 5) for name, count in counts.items()}
        return values


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def drop_from(path: Path, step: int) -> None:
    """Drops the lines of `step` and later, which a resumed run writes again, and a line cut short by a kill.

    The file is replaced atomically, and only if a line is dropped.
    """
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    if kept != lines:
        files.write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def last_entry(run: Location) -> dict[str, Any] | None:
    """The newest line of `RUN/metrics.jsonl`; None if there is none."""
    path = urls.join(run, "metrics.jsonl")
    lines = files.read_text(path).splitlines(keepends=True) if files.is_file(path) else []
    return next((json.loads(line) for line in reversed(lines) if line.endswith("\n")), None)


def last_step(run: Location) -> int | None:
    """The newest step in `RUN/metrics.jsonl`; None if there is none."""
    entry = last_entry(run)
    return entry["step"] if entry else None


class Board:
    """Writes scalars for TensorBoard, in the calling thread.

    tensorboardX's `SummaryWriter` uses a queue and a thread, which its `flush` does not wait for.
    """

    def __init__(self, folder: Path, step: int):
        """Hides earlier events in the folder for `step` and later."""
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{step:07d}")
        self._write(step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


class MetricsLog:
    """Appends to `RUN/metrics.jsonl`, `RUN/tensorboard`, Ray's endpoint and, if configured, MLflow and W&B, from `step`
    on; rank 0 only."""

    def __init__(self, run: Path, step: int = 0, recipe: Recipe | None = None):
        run.mkdir(parents=True, exist_ok=True)
        drop_from(run / "metrics.jsonl", step)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  closed in `close`
        self._board = Board(run / "tensorboard", step)
        made = (mlflow.mlflow_tracker(run, recipe), wandb.wandb_tracker(run, recipe)) if recipe else ()
        self._trackers = [tracker for tracker in made if tracker]
        self._exported = RunMetrics(run, recipe, step) if recipe else None

    def write(self, step: int, stage: str, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "stage": stage, "time": round(time.time(), 3), **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._board.write(step, numbers)
        if self._exported:
            self._exported.write(step, numbers)
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def saved(self, step: int, seconds: float) -> None:
        """Notes a checkpoint after `step` steps, for which training stood still for `seconds`."""
        if self._exported:
            self._exported.saved(step, seconds)

    def flush(self) -> None:
        """Makes everything written so far outlive this process."""
        self._board.flush()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()
        for tracker in self._trackers:
            tracker.close()


class MetricsWatcher:
    """Passes the lines that rank 0 appends to `metrics.jsonl` to a callback; a context manager around the run.

    A restart of the workers replaces the file by one without the steps to repeat, and in a bucket it is replaced
    whenever lines are added. A file that does not go on from the last line that was read is read from its beginning;
    steps before `start`, or passed on before, are skipped.
    """

    def __init__(self, path: Location, start: int, progress: Progress):
        self._path, self._progress = path, progress
        self._seconds = BUCKET_SECONDS if urls.is_url(path) else 0.5
        self._last = b""  # line before the position
        self._position = 0
        self._newest = start - 1  # step passed on
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MetricsWatcher:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self._seconds):
            self._read()
        self._read()

    def _read(self) -> None:
        for line in self._new_lines():
            self._last = line
            self._position += len(line)
            entry = json.loads(line)
            if entry["step"] > self._newest:
                self._newest = entry["step"]
                self._progress(entry)

    def _new_lines(self) -> list[bytes]:
        try:
            with files.open_input(self._path) as file:
                begin = self._position - len(self._last)
                file.seek(min(begin, file.size()))
                data = file.read()
                if not data.startswith(self._last):
                    self._position, self._last = 0, b""
                    file.seek(0)
                    data = file.read()
        except UserError:  # not there yet, or a store that is away for a moment
            return []
        lines = data[len(self._last) :].splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n")]

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)
