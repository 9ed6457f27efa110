"""What a run says about itself: one JSON line per step, the same scalars for TensorBoard."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from lumen_ray.decoders.base import LossTerm
from lumen_ray.train import parallel

Progress = Callable[[dict[str, Any]], None]


def reduce_losses(
    losses: dict[str, LossTerm], names: tuple[str, ...], weights: dict[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """(scalar to call `backward` on, global mean of each loss).

    Each loss is its sum over the normaliser of all ranks. FSDP averages gradients over ranks, so the scalar is
    multiplied by their number: the result is the gradient of the global batch.
    """
    device = losses["lm"].total.device
    zero = torch.zeros((), device=device)
    sums = torch.stack([losses[n].total.detach() if n in losses else zero for n in names])
    counts = torch.stack([losses[n].count.detach() if n in losses else zero for n in names])
    both = parallel.sum_over_ranks(torch.cat([sums, counts]))
    sums, counts = both[: len(names)], both[len(names) :].clamp_min(1.0)
    total = sum(weights.get(n, 1.0) * losses[n].total / counts[i] for i, n in enumerate(names) if n in losses)
    return total * parallel.world_size(), {n: float(s / c) for n, s, c in zip(names, sums, counts, strict=True)}


def per_task(batch: dict[str, Any], losses: dict[str, LossTerm]) -> dict[str, float]:
    """Mean loss by task on this rank: of the LM (routing token or text) and of the heatmap of perception prompts."""
    tasks: list[str] = batch["tasks"]
    sums: dict[str, list[float]] = {}
    for task, value in zip(tasks, losses["lm"].each.tolist(), strict=True):
        sums.setdefault(f"lm/{task}", []).append(value)
    if "heatmap" in losses:
        members = batch["layout"].link_branches["perception"].tolist()
        for branch, value in zip(members, losses["heatmap"].each.tolist(), strict=True):
            sums.setdefault(f"heatmap/{tasks[branch]}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def drop_from(path: Path, step: int) -> None:
    """Drops the lines of `step` and later, which a resumed run writes again, and a line cut short by a kill.

    The file is replaced at once, and left alone where all lines stay.
    """
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    if kept != lines:
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)


class MetricsLog:
    """Appends to `RUN/metrics.jsonl` and `RUN/tensorboard`, from `step` on; only rank 0 holds one."""

    def __init__(self, run: Path, step: int = 0):
        run.mkdir(parents=True, exist_ok=True)
        drop_from(run / "metrics.jsonl", step)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  closed in `close`
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def write(self, step: int, stage: str, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "stage": stage, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
