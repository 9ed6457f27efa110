"""CPU time and memory of a process and those that it has started, Ray's among them; of Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def _fields(pid: str) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, ..."""
    return (_PROC / pid / "stat").read_text().rpartition(")")[2].split()


def descendants(root: int | None = None) -> Iterator[str]:
    """The ids of the process `root`, by default this one, and all below it; none without /proc."""
    children: dict[str, list[str]] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdigit():
            try:
                children.setdefault(_fields(entry.name)[1], []).append(entry.name)
            except (OSError, IndexError):  # it has ended meanwhile
                continue
    waiting = [str(root or os.getpid())] if children else []
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def cpu_by_command(root: int | None = None) -> dict[str, float]:
    """CPU seconds of the processes as of `descendants`, by their command lines; those that have ended are left out."""
    found: dict[str, float] = {}
    for pid in descendants(root):
        try:
            fields, command = _fields(pid), (_PROC / pid / "cmdline").read_bytes()
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):
            continue
        name = command.replace(b"\0", b" ").decode(errors="replace").strip()
        found[name] = found.get(name, 0) + seconds
    return found


def cpu_seconds() -> float:
    """CPU seconds of this process and all below it, those that have ended left out."""
    return sum(cpu_by_command().values())


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
