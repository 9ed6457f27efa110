"""Runs a verb of the command line as a job of a cluster."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from lumen_ray.console import say
from lumen_ray.errors import UserError
from lumen_ray.remote.head import Head, JobState
from lumen_ray.remote.paths import check_visible, shared_folders
from lumen_ray.remote.working_dir import WorkingDir

EXIT_STOPPED = 130
EXIT_FAILED = 1
_POLL_S = 0.5


@dataclass(frozen=True)
class Submission:
    """Where and how a command runs: the options that `command.add_submit_args` adds to a verb."""

    address: str
    working_dir: str = "."
    env: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    job_id: str | None = None
    no_wait: bool = False

    def run(self, argv: Sequence[str], arguments: Mapping[str, Any]) -> int:
        """Submits `lumen-ray ARGV`, prints its logs and returns its exit status, or 0 at once with `no_wait`.

        arguments: `argv` parsed. Everything that can be wrong is checked before anything starts; raises `UserError`.
        """
        env = environment(self.env)
        shared = shared_folders(self.shared)
        packed = None if self.working_dir == "none" else WorkingDir.scan(self.working_dir)
        check_visible(arguments, packed, shared)
        head = Head(self.address)
        with tempfile.TemporaryDirectory() as folder:
            package = None
            if packed is not None and packed.files:
                package = Path(folder) / "working_dir.zip"
                packed.write(package)
                say(escape(f"working directory: {packed.describe()}"))
            command = f"python -m lumen_ray.cli {shlex.join(argv)}"
            job_id = head.submit(command, str(package) if package else None, env, self.job_id)
        say(escape(f"job {job_id} at {head.address}; lumen-ray jobs logs {job_id} --follow --address {head.address}"))
        return 0 if self.no_wait else follow(head, job_id)


def environment(given: Sequence[str]) -> dict[str, str]:
    """``["NAME", "OTHER=value"]``: a name alone takes the value that it has here. Raises `UserError` if it has none."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name.isidentifier():
            raise UserError(f"--env '{text}' must be NAME or NAME=VALUE", "usage")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name} is not set in this shell; set it, or give {name}=VALUE", "missing_env")
            value = os.environ[name]
        found[name] = value
    return found


def follow(head: Head, job_id: str) -> int:
    """Prints the logs of a job until it ends; returns its exit status. Ctrl-C asks whether to stop it."""
    try:
        for piece in head.follow(job_id):
            print(piece, end="", flush=True)
        return exit_status(_ended(head, job_id))
    except KeyboardInterrupt:
        return _interrupted(head, job_id)


def exit_status(job: JobState) -> int:
    """That of the job's command; says so where it has none."""
    if job.status == "STOPPED":
        say(escape(f"job {job.job_id} was stopped"))
        return EXIT_STOPPED
    if job.exit_code is not None:
        # 128 and the signal, as a shell has it
        return 128 - job.exit_code if job.exit_code < 0 else job.exit_code
    if job.status == "SUCCEEDED":
        return 0
    say(escape(f"job {job.job_id} failed: {' '.join(job.message.split())[-500:]}"))
    return EXIT_FAILED


def _ended(head: Head, job_id: str) -> JobState:
    while not (job := head.job(job_id)).has_ended:
        time.sleep(_POLL_S)
    return job


def _interrupted(head: Head, job_id: str) -> int:
    """Stops the job or leaves it, as the user chooses; without a terminal it goes on."""
    if _wants_to_stop(job_id):
        head.stop(job_id)
        say(escape(f"stopping job {job_id}; run the same command again to continue where the verb can"))
    else:
        say(escape(f"job {job_id} goes on; lumen-ray jobs logs|status|stop {job_id} --address {head.address}"))
    return EXIT_STOPPED


def _wants_to_stop(job_id: str) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nstop job {job_id}, or leave it running? [stop/LEAVE] ").strip().lower() in ("s", "stop")
    except (KeyboardInterrupt, EOFError):
        return False
