"""CPU time and memory of the processes that this one has started, Ray's among them; of Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def _fields(pid: str) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, ..."""
    return (_PROC / pid / "stat").read_text().rpartition(")")[2].split()


def descendants() -> Iterator[str]:
    """The ids of this process and all below it; none without /proc."""
    children: dict[str, list[str]] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdigit():
            try:
                children.setdefault(_fields(entry.name)[1], []).append(entry.name)
            except (OSError, IndexError):  # it has ended meanwhile
                continue
    waiting = [str(os.getpid())] if children else []
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def cpu_seconds() -> float:
    """CPU seconds of this process and all below it, those that have ended left out."""
    total = 0
    for pid in descendants():
        try:
            fields = _fields(pid)
            total += int(fields[11]) + int(fields[12])
        except (OSError, IndexError):
            continue
    return total / os.sysconf("SC_CLK_TCK")


def rss_bytes(name: str) -> list[int]:
    """Memory of each process below this one whose command line has `name`."""
    found = []
    for pid in descendants():
        try:
            if name.encode() in (_PROC / pid / "cmdline").read_bytes():
                found.append(int((_PROC / pid / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, IndexError):
            continue
    return found
