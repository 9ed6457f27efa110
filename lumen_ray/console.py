"""What the commands read and print: lists of names; a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(highlight=False)
LINE_EVERY_S = 10.0
RECENT_S = 60.0  # time left is told from the speed of this long


def comma_separated(text: str) -> list[str]:
    """The names in an option of a command line."""
    return [part.strip() for part in text.split(",") if part.strip()]


def say(text: str) -> None:
    console.print(text, soft_wrap=True)


class Bar:
    """`update(done, total, note)`; thread-safe enough for callbacks from a watcher thread."""

    def __init__(self, title: str, progress: Progress | None):
        self._title, self._progress = title, progress
        self._task = progress.add_task(title, total=None, note="") if progress else None
        self._last_line = time.monotonic()
        # of the last minute, oldest first: a resumed job does not begin at 0, and stages differ in speed
        self._recent: deque[tuple[float, int]] = deque()

    def update(self, done: int, total: int | None, note: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        self._recent.append((now, done))
        while now - self._recent[0][0] > RECENT_S and len(self._recent) > 2:
            self._recent.popleft()
        began, first = self._recent[0]
        if now - self._last_line < LINE_EVERY_S and done != total:
            return
        self._last_line = now
        left = ""
        if total and first < done < total:
            left = f", about {seconds((now - began) * (total - done) / (done - first))} left"
        say(f"  {self._title}: {done}/{total}{left}{'  ' + note if note else ''}")

    def line(self, text: str) -> None:
        """What is to be known between updates, as a line that stays."""
        say(f"  {self._title}: {text}")


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A progress display that ends with the block."""
    if not console.is_terminal:
        say(f"{title}: starting")  # Ray takes a while, on a busy machine a minute
        yield Bar(title, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(title, progress)


def training_note(line: dict[str, Any]) -> str:
    """One line for one entry of `metrics.jsonl`."""
    losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
    speed = f"{line['samples_per_s']:.0f} img/s, {line['tokens_per_s']:.0f} tokens/s, {line['memory_gb']:.1f} GB"
    return f"{line['stage']}: {losses}  {speed}, {line['data_wait']:.0%} waiting for data"


def seconds(value: float) -> str:
    """``75 -> "1:15"``."""
    minutes, rest = divmod(int(round(value)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
