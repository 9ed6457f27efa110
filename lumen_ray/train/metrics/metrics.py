"""What a run says about itself: one JSON line per step, the same scalars for TensorBoard."""

from __future__ import annotations

import json
import os
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

from lumen_ray.data.files import write_atomically
from lumen_ray.model.build import Generalist
from lumen_ray.recipe import Recipe
from lumen_ray.train.losses import StepSums
from lumen_ray.train.metrics import flops
from lumen_ray.train.metrics.mlflow import mlflow_tracker
from lumen_ray.trunk.batch import TrainingBatch

Progress = Callable[[dict[str, Any]], None]
FLUSH_SECONDS = 30.0  # between flushes of what TensorBoard reads, beside those at checkpoints


class Meter:
    """How fast a rank works, and on what: rates over all ranks, memory and utilisation of this one."""

    def __init__(self, model: Generalist, precision: str, device: torch.device):
        self._model, self._device = model, device
        self._peak = flops.peak(device, precision)

    def read(self, batches: list[TrainingBatch], sums: StepSums, waited: float, busy: float) -> dict[str, float]:
        """`waited`, `busy`: seconds waiting for data and working."""
        seconds = waited + busy
        values = {
            "samples_per_s": round(sums.images / seconds, 2),
            "tokens_per_s": round(sums.tokens / seconds, 1),
            "padding": round(1 - sums.tokens / sums.computed_tokens, 4),
            "data_wait": round(waited / seconds, 4),
            "memory_gb": round(peak_memory(self._device) / 1e9, 3),
        }
        if self._peak:
            parts = flops.of_step(self._model, batches)
            values["mfu"] = round(sum(parts.values()) / seconds / self._peak, 5)
            values |= {f"mfu/{name}": round(count / seconds / self._peak, 5) for name, count in parts.items()}
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, the most this process had in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def drop_from(path: Path, step: int) -> None:
    """Drops the lines of `step` and later, which a resumed run writes again, and a line cut short by a kill.

    The file is replaced at once, and left alone where all lines stay.
    """
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    if kept != lines:
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def last_step(run: Path) -> int | None:
    """The newest step that `RUN/metrics.jsonl` tells of."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("\n")), None)


class Board:
    """Scalars as TensorBoard reads them, written as they come.

    tensorboardX's `SummaryWriter` passes them through a queue and a thread, which its `flush` does not wait for.
    """

    def __init__(self, folder: Path, step: int):
        """What is there of `step` and later is hidden."""
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{step:07d}")
        self._write(step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


class MetricsLog:
    """Appends to `RUN/metrics.jsonl`, `RUN/tensorboard` and, if told to, MLflow, from `step` on; of rank 0 only."""

    def __init__(self, run: Path, step: int = 0, recipe: Recipe | None = None):
        run.mkdir(parents=True, exist_ok=True)
        drop_from(run / "metrics.jsonl", step)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  closed in `close`
        self._board = Board(run / "tensorboard", step)
        self._tracker = mlflow_tracker(run, recipe) if recipe else None

    def write(self, step: int, stage: str, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "stage": stage, "time": round(time.time(), 3), **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._board.write(step, numbers)
        if self._tracker:
            self._tracker.write(step, numbers)

    def flush(self) -> None:
        """What was written so far outlives this process."""
        self._board.flush()
        if self._tracker:
            self._tracker.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._tracker:
            self._tracker.close()


class MetricsWatcher:
    """Passes the lines that rank 0 appends to `metrics.jsonl` to a callback while the run goes on.

    After a restart of the workers the file is another one, without the steps that are done again: it is read from its
    beginning, and steps told before, or before step `start`, are not told again.
    """

    def __init__(self, path: Path, start: int, progress: Progress):
        self._path, self._progress = path, progress
        found = path.stat() if path.exists() else None
        self._inode, self._position = (found.st_ino, found.st_size) if found else (None, 0)
        self._told = start - 1  # newest step passed on
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._read()
        self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with open(self._path) as file:
            if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                self._inode, self._position = inode, 0
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                entry = json.loads(line)
                if entry["step"] > self._told:
                    self._told = entry["step"]
                    self._progress(entry)

    def stop(self) -> None:
        self._done.set()
        self._thread.join(timeout=10)
