"""Groups of gloo ranks as real processes, and a way to kill them at any of the moments they touch their run folder.

Processes are forked from one that has imported everything, so a group of two starts in well under a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from lumen_ray.train.launch import PreparedRun, train_local

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lumen_ray.train.launch", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Moment:
    """The `number`-th time (from 1) that `rank` is about to open, make, rename or remove something in the run folder
    with `text` in the line `touch` gives of it; with `text` empty, anything."""

    rank: int
    text: str
    number: int = 1


def touch(event: str, args: tuple, run: Path) -> str:
    """What one of Python's audit events does to a run folder ("open PATH", "os.rename FROM TO"); empty if nothing."""
    if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        return ""
    line = " ".join([event, *(os.fsdecode(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike)))])
    inside_a_tree = event in ("os.remove", "os.rmdir") and args[1] != -1  # by name in an open folder: only `rmtree`
    return line if inside_a_tree or str(run) in line else ""


def die_at(moment: Moment, run: Path) -> None:
    """Makes this process end itself as `kill -9` does."""
    left = moment.number

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        line = touch(event, args, run)
        if line and moment.text in line:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_touches(run: Path, to: Path) -> None:
    """Counts what `die_at` could have died at, into the file `to`."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if touch(event, args, run):
            count += 1
            with open(to, "w") as file:
                file.write(str(count))

    sys.addaudithook(hook)


def _rank(rank: int, ranks: int, prepared: PreparedRun, store: str, moment: Moment | None, counts: Path | None) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    run = Path(prepared.job.run)
    if counts:
        count_touches(run, counts / str(rank))
    if moment and moment.rank == rank:
        die_at(moment, run)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), ranks, rank)
    train_local(prepared)
    dist.destroy_process_group()


def run_ranks(
    prepared: PreparedRun,
    ranks: int = 2,
    moment: Moment | None = None,
    counts: Path | None = None,
    together: bool = True,
    timeout: float = 300,
) -> list[int]:
    """Trains with `ranks` processes; their exit codes. Fails when they are not done in `timeout` seconds.

    When one is killed, the others are killed at once, or, unless `together`, must end by themselves.
    """
    run = Path(prepared.job.run)
    run.mkdir(parents=True, exist_ok=True)
    store = run.parent / f"{run.name}-store-{time.monotonic_ns()}"
    group = [
        CONTEXT.Process(target=_rank, args=(r, ranks, prepared, str(store), moment, counts), daemon=True)
        for r in range(ranks)
    ]
    for process in group:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while alive := [p for p in group if p.is_alive()]:
            left = deadline - time.monotonic()
            assert left > 0, f"ranks {[group.index(p) for p in alive]} did not end in {timeout} s"
            wait([p.sentinel for p in alive], left)
            if together and any(p.exitcode for p in group):
                for process in group:
                    process.kill()
    finally:
        for process in group:
            process.kill()
            process.join()
    return [process.exitcode for process in group]
