"""The profile of some steps of a run: a Chrome trace and a table of the slowest operations, for each rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.train import parallel

FOLDER = "profile"
_SHOWN = 20  # operations in the table
_TABLE_WIDTH = 56  # of their names


def check_profile(recipe: Recipe, run: urls.Location, start: int) -> None:
    """Raises `UserError` if the run has none of the steps to profile, and warns if it resumes, at step `start`, behind
    them and has not profiled them."""
    if recipe.profile is None:
        return
    first, end = recipe.profile
    if first >= recipe.total_steps:
        raise UserError(
            f"profile {first}:{end} begins behind the run's last step, {recipe.total_steps - 1}; give earlier steps",
            "invalid_profile",
        )
    if start >= end and not files.is_file(urls.join(run, FOLDER, _table_name(0))):
        warnings.warn(f"nothing is profiled: the run resumes at step {start}, behind {first}:{end}", stacklevel=2)


def _table_name(rank: int) -> str:
    return f"rank{rank}.txt"


class StepProfiler:
    """Profiles the steps [first, end) of a rank and writes `RUN/profile/rank<rank>.json.gz` (Chrome trace) and `.txt`.

    Without steps nothing is measured, and torch's profiler is not started.
    """

    def __init__(self, run: Path, recipe: Recipe, device: torch.device):
        self._run, self._device = run, device
        first, end = recipe.profile or (0, 0)
        self._steps = range(first, min(end, recipe.total_steps))
        self._profile: profile | None = None
        self._first = 0  # step with which the profile began: later than asked for in a resumed run

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context of a whole training step, waiting for data included."""
        if step not in self._steps:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            self._profile, self._first = profile(activities=activities, acc_events=True), step
            self._profile.start()
        try:
            with record_function(f"step {step}"):
                yield
        except BaseException:
            self._drop()
            raise
        if step + 1 == self._steps.stop:
            self._finish(step + 1)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Names a part of a step in the trace."""
        if self._profile is None:
            yield
            return
        with record_function(name):
            yield

    def _finish(self, end: int) -> None:
        """Writes trace and table of the steps so far."""
        assert self._profile is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profile.stop()
        file = self._run / FOLDER / _table_name(parallel.rank())
        file.parent.mkdir(parents=True, exist_ok=True)
        finished, self._profile = self._profile, None
        files.write_atomically(file.with_suffix(".json.gz"), lambda path: _export(finished, path))
        title = f"steps {self._first} to {end - 1} of rank {parallel.rank()}"
        text = f"{title}\n{_table(finished.key_averages(), self._device)}"
        files.write_atomically(file, lambda path: path.write_text(text))

    def _drop(self) -> None:
        """Ends a profile without writing it."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def _export(finished: profile, path: Path) -> None:
    packed = path.with_name(f"{path.name}.json.gz")  # the ending by which torch compresses the trace
    finished.export_chrome_trace(str(packed))
    packed.replace(path)


def _table(averages: Any, device: torch.device) -> str:
    """The operations with the most time of their own, one a line."""
    kind = "device" if device.type == "cuda" else "cpu"

    def own(event: Any) -> float:
        return getattr(event, f"self_{kind}_time_total")

    events = [event for event in averages if own(event) > 0]
    total = sum(map(own, events)) or 1.0
    where = "GPU" if kind == "device" else "CPU"
    lines = [f"{'operation':<{_TABLE_WIDTH}} {'calls':>8} {f'own {where} ms':>12} {'share':>7} {'with callees':>13}"]
    for event in sorted(events, key=own, reverse=True)[:_SHOWN]:
        name = event.key if len(event.key) <= _TABLE_WIDTH else f"{event.key[: _TABLE_WIDTH - 3]}..."
        whole = getattr(event, f"{kind}_time_total")
        lines.append(
            f"{name:<{_TABLE_WIDTH}} {event.count:>8} {own(event) / 1e3:>12.1f} {own(event) / total:>7.1%} "
            f"{whole / 1e3:>13.1f}"
        )
    return "\n".join(lines) + "\n"
