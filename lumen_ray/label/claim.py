"""Keeps two jobs from writing one output folder: the running one holds ``ledger/running.json`` and renews it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Self

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError

RENEW_S = 10.0
#: a claim that was not renewed for so long belongs to a job that was killed
STALE_S = 60.0


def read_claim(ledger: urls.Location) -> dict[str, Any] | None:
    """``host``, ``pid``, ``token``, ``started``, ``renewed`` (seconds since the epoch) and ``state`` of the job that
    holds a ledger folder; None if none does, or the one that did is dead."""
    path = urls.join(ledger, "running.json")
    try:
        claim = json.loads(files.read_text(path)) if files.is_file(path) else None
    except (UserError, ValueError):  # replaced or removed at this moment
        return None
    return claim if claim and _is_alive(claim) else None


def _is_alive(claim: dict[str, Any]) -> bool:
    if claim["host"] == socket.gethostname():
        try:
            os.kill(claim["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's process
    return time.time() - claim["renewed"] < STALE_S


class Claim:
    """Holds a ledger folder while the context lasts. `state`: JSON types that `read_claim` reads, set by the job.

    Entering raises `UserError` (`output_in_use`) if another job is alive. In a bucket, two jobs that start within the
    same second may both enter; they then do some fragments twice, with the same labels.
    """

    def __init__(self, ledger: urls.Location):
        self._ledger = ledger
        self._path = urls.join(ledger, "running.json")
        self._started = time.time()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.state: dict[str, Any] = {}

    def __enter__(self) -> Self:
        other = read_claim(self._ledger)
        if other is not None and other["token"] != self._token:
            ago = time.time() - other["renewed"]
            raise UserError(
                f"the output folder is being written by process {other['pid']} on {other['host']}, which renewed its "
                f"claim {ago:.0f} s ago; wait for it or stop it (after a kill, try again in {STALE_S:.0f} s), or give "
                "another output folder",
                "output_in_use",
            )
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="label-claim", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(UserError):
            files.remove(self._path)

    @property
    def _token(self) -> str:
        return f"{socket.gethostname()}:{os.getpid()}:{self._started}"

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(UserError):  # a store that is away for a moment
                self._renew()

    def _renew(self) -> None:
        claim = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": self._token,
            "started": self._started,
            "renewed": time.time(),
            "state": self.state,
        }
        files.write_bytes(self._path, json.dumps(claim).encode(), durable=False)
