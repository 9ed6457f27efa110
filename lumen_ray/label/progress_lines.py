"""The progress of a job as lines of JSON on standard output, for programs that watch it."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Self

from lumen_ray.label.progress import Status

EVERY_S = 1.0


class ProgressLines:
    """Prints a line at once and then every `EVERY_S` seconds while the context lasts, whether anything was done or not.

    ``state``: "starting" until the first result, with ``seconds`` since the start; then, with `Status.facts`, "listing"
    while the input is being listed beside the work, "labelling" ("answering" for requests), and "finishing" once all is
    done and exports are written.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._status: Status | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="progress-lines", daemon=True)

    def __enter__(self) -> Self:
        self._print()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def update(self, status: Status) -> None:
        """Takes the progress of a job, which goes on counting in `status`."""
        self._status = status
        if _is_done(status):
            with suppress(OSError):  # nobody reads any more, which is no reason to leave the exports out
                self._print()

    def _keep(self) -> None:
        with suppress(OSError):
            while not self._ended.wait(EVERY_S):
                self._print()

    def _print(self) -> None:
        with self._lock:
            sys.stdout.write(json.dumps(self._line()) + "\n")
            sys.stdout.flush()

    def _line(self) -> dict[str, Any]:
        status = self._status
        if status is None:
            return {"state": "starting", "seconds": round(time.monotonic() - self._started, 1)}
        work = "labelling" if status.counted == "images" else "answering"
        state = "finishing" if _is_done(status) else work if status.is_listed else "listing"
        return {"state": state, **status.facts()}


def _is_done(status: Status) -> bool:
    return status.is_listed and status.done == status.total
