"""What something needs of this process's memory at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _kilobytes(what: str) -> int:
    """Of this process's memory, by the name that the system has for it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


@contextmanager
def peak_of() -> Iterator[Callable[[], float]]:
    """The function says by how many MiB the resident memory had grown at most since the beginning; mapped files count.
    Skips where the system does not tell."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("this system does not tell a process's peak memory")
    before = _kilobytes("VmRSS")
    yield lambda: (_kilobytes("VmHWM") - before) / 1024
