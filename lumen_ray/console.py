"""Input and output of the commands: option values; a live progress bar on a terminal, lines in a log file."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from lumen_ray.errors import UserError

console = Console(highlight=False)
LINE_EVERY_S = 10.0
RECENT_S = 60.0  # the time left is estimated from the speed over this long


def comma_separated(text: str) -> list[str]:
    """``"a, b" -> ["a", "b"]``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def class_names(text: str) -> list[str]:
    """The value of ``--classes``: names separated by commas, or the path of a file with one name a line.

    Empty lines of a file and those that begin with ``#`` are passed over. Raises `UserError` for a file that does not
    exist or names no class; one name with a ``/`` is taken for a path, unless a comma follows it.
    """
    path = Path(text)
    if not os.path.isfile(path):  # `Path.is_file` raises for a text longer than a file name may be
        if path.suffix in (".txt", ".csv"):
            raise UserError(f"class file '{text}' does not exist", "invalid_classes")
        if "/" in text and "," not in text:
            raise UserError(
                f"class file '{text}' does not exist; write a comma behind it if it is the name of a class",
                "invalid_classes",
            )
        return comma_separated(text)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"class file '{text}' cannot be read; give a UTF-8 text file with one class a line", "invalid_classes"
        ) from None
    if not names:
        what = "holds only comments" if any(lines) else "is empty"
        raise UserError(f"class file '{text}' {what}; write one class a line into it", "invalid_classes")
    return names


def texts_by_task(pairs: list[str]) -> dict[str, list[str]]:
    """The values of ``--text``: ``["vqa=how many ?"] -> {"vqa": ["how many ?"]}``."""
    texts: dict[str, list[str]] = {}
    for task, text in _split_pairs("--text", pairs, "TASK=TEXT", "'vqa=how many circles are there ?'"):
        texts.setdefault(task, []).append(text)
    return texts


def decoders_by_task(pairs: list[str]) -> dict[str, str]:
    """The values of ``--decoders``: ``["detect=NAME"] -> {"detect": "NAME"}``."""
    decoders: dict[str, str] = {}
    for task, decoder in _split_pairs("--decoders", pairs, "TASK=DECODER", "detect=NAME"):
        if task in decoders:
            raise UserError(f"--decoders names task '{task}' twice; give one decoder for it", "usage")
        decoders[task] = decoder
    return decoders


def _split_pairs(option: str, pairs: list[str], form: str, example: str) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        task, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} '{pair}' must be {form}, e.g. {option} {example}", "usage")
        yield task.strip(), value.strip()


def say(text: str) -> None:
    """Prints a line, with rich's markup, unwrapped."""
    console.print(text, soft_wrap=True)


class Bar:
    """Progress of one job. `update` may be called from another thread.

    progress: rich's display, with a task added here; None writes a line every `LINE_EVERY_S` seconds instead.
    """

    def __init__(self, title: str, progress: Progress | None):
        self._title = title
        self._display = (progress, progress.add_task(title, total=None, note="")) if progress else None
        self._last_line = time.monotonic()
        self._last_text = ""
        # (time, done) of the last minute, oldest first: a resumed job does not start at 0, and stages differ in speed
        self._recent: deque[tuple[float, int]] = deque()

    def update(self, done: int, total: int | None, note: str = "") -> None:
        if self._display is not None:
            progress, task = self._display
            progress.update(task, completed=done, total=total, note=note)
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
        number = str(done) if total is None else f"{done}/{total}"
        text = f"  {self._title}: {number}{left}{'  ' + note if note else ''}"
        if text != self._last_text:  # an export that passes over the images several times is done several times
            say(text)
        self._last_text = text

    def line(self, text: str) -> None:
        """Prints a line that stays above the progress display."""
        say(f"  {self._title}: {text}")


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A progress display for the time of a `with` block."""
    if not console.is_terminal:
        say(f"{title}: starting")  # Ray takes seconds to start, on a busy machine a minute
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


def seconds(value: float) -> str:
    """Minutes and seconds, or hours: ``75 -> "1:15"``."""
    minutes, rest = divmod(int(round(value)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
