"""A side of a comparison in a process of its own, asked by JSON lines: another checkout, or another environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumen_ray.errors import UserError


class JsonWorker:
    """A process that answers every line of JSON with one. Raises `UserError` if it stops; `name` is its name there."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path | None = None,
        folder: Path | None = None,
    ):
        """`folder`: the process's current folder; `log`: file of what it writes to standard error, the last line of
        which errors name; None: the terminal."""
        self._name, self._log = name, log
        err = None if log is None else log.open("w")
        try:
            self._process = subprocess.Popen(
                list(command), env=env, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            )
        finally:
            if err is not None:
                err.close()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to a question."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has stopped, which `read` reports
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next line that it writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            why = (
                "its error is above" if self._log is None else "".join(self._log.read_text().strip().splitlines()[-1:])
            )
            raise UserError(f"{self._name} stopped: {why}", "bench_failed")
        return json.loads(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self, seconds: float = 60) -> None:
        """Ends its input, and the process itself if it has not ended after some time."""
        try:
            self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def answer_once(name: str, command: Sequence[str], env: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What a process writes as its only line. `folder`: its current folder, which Ray's workers look for modules in
    first, and that of its ``log.txt``. Raises `UserError` as `JsonWorker`."""
    worker = JsonWorker(name, command, {**env, "HF_HUB_OFFLINE": "1"}, folder / "log.txt", folder)
    try:
        return worker.read()
    finally:
        worker.close()
