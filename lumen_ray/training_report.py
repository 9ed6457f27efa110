"""The lines of `metrics.jsonl` on the terminal, as a run writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape

from lumen_ray.console import Bar, say

#: of the run folder: the table of the first rank's profile, which `train.metrics.profiler` writes
PROFILE_TABLE = Path("profile") / "rank0.txt"
MOST_REJECTED = 20  # images to name


class TrainingReport:
    """Shows the progress of a run, its validations and its profile."""

    def __init__(self, bar: Bar, total: int, run: str | Path):
        self._bar, self._total, self._table = bar, total, Path(run) / PROFILE_TABLE
        self._shown = self._changed()
        self._rejected: set[str] = set()

    def update(self, line: dict[str, Any]) -> None:
        """Shows a line of `metrics.jsonl`."""
        self._bar.update(line["step"] + 1, self._total, training_note(line))
        if note := validation_note(line):
            self._bar.line(note)
        self._show_rejected(line.get("rejected", ()))
        self._show_profile()

    def finish(self) -> None:
        """Shows what came after the last line."""
        self._show_profile()

    def _show_rejected(self, entries: Iterable[dict[str, Any]]) -> None:
        """Names each image that could not be trained on once, the first ones of a run."""
        for entry in entries:
            if entry["image_id"] in self._rejected or len(self._rejected) > MOST_REJECTED:
                continue
            self._rejected.add(entry["image_id"])
            shown = len(self._rejected) <= MOST_REJECTED
            self._bar.line(escape(rejected_note(entry)) if shown else "further images left out are in metrics.jsonl")

    def _show_profile(self) -> None:
        if (changed := self._changed()) != self._shown:
            self._shown = changed
            say(escape(self._table.read_text(encoding="utf-8").rstrip()))
            say(f"traces for chrome://tracing or ui.perfetto.dev -> {self._table.parent}/rank*.json.gz")

    def _changed(self) -> float | None:
        return self._table.stat().st_mtime if self._table.is_file() else None


def training_note(line: dict[str, Any]) -> str:
    """The note of the progress display for a line of `metrics.jsonl`: losses and speed, then sources and tasks where
    there are several."""
    losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
    speed = f"{line['samples_per_s']:.0f} img/s, {line['tokens_per_s']:.0f} tokens/s, {line['memory_gb']:.1f} GB"
    parts = [f"{line['stage']}: {losses}  {speed}, {line['data_wait']:.0%} waiting for data"]
    passes, by_source = _named(line, "passes/"), _named(line, "source_loss/")
    if len(passes) > 1:
        known = (f"{name}{f' {by_source[name]:.2f}' if name in by_source else ''}" for name in passes)
        counts = (f"{text} ({passes[name]:.2f} passes)" for name, text in zip(passes, known, strict=True))
        parts.append(", ".join(counts))
    if len(by_task := _named(line, "task_loss/")) > 1:
        parts.append(", ".join(f"{name} {value:.2f}" for name, value in by_task.items()))
    return "; ".join(parts)


def validation_note(line: dict[str, Any]) -> str:
    """A sentence on the validation after a step; empty if there was none."""
    if not (values := _named(line, "validation/")):
        return ""
    took, best = values.pop("seconds"), values.pop("best")
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if _is_main(name))
    return f"validation after step {line['step']}: {metrics}{' (best so far)' if best else ''}, {took:.0f} s"


def rejected_note(entry: dict[str, Any]) -> str:
    """A sentence on an image that could not be trained on."""
    place = f"{entry['file']}, row group {entry['row_group']}, row {entry['row']}" if "file" in entry else "?"
    return f"left out image {entry['image_id']} ({place}): {entry['reason']}"


def _named(line: dict[str, Any], start: str) -> dict[str, float]:
    return {name.removeprefix(start): value for name, value in line.items() if name.startswith(start)}


def _is_main(metric: str) -> bool:
    """Whether a metric is one of the few to show; all are in `metrics.jsonl`."""
    return metric.endswith(("_AP", "_AP50", "_p50", "_f1", "_accuracy", "_iou", "_miou", "_attributes"))
