"""Keeps two jobs from writing one folder, in any store: the running one holds a file in it, and renews that."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any, Self

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError

RENEW_S = 10.0
#: a claim that was not renewed for so long belongs to a job that was killed
STALE_S = 60.0
SETTLE_S = 0.1
RUNNING = "running.json"


def read_claim(folder: urls.Location, name: str = RUNNING) -> dict[str, Any] | None:
    """``host``, ``pid``, ``token``, ``started``, ``renewed`` (seconds since the epoch) and ``state`` of the job that
    holds a folder; None if none does, or the one that did is dead."""
    claim = _read(urls.join(folder, name))
    return claim if claim and _is_alive(claim) else None


def _read(path: str) -> dict[str, Any] | None:
    try:
        claim = json.loads(files.read_text(path)) if files.is_file(path) else None
    except (UserError, ValueError):  # replaced or removed at this moment, or damaged
        return None
    is_claim = isinstance(claim, dict) and claim.keys() >= {"host", "pid", "token", "started", "renewed", "state"}
    return claim if is_claim else None


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
    """Holds a folder while the context lasts. `state`: JSON types that `read_claim` reads, set by the job; `name`: of
    the file in the folder, of which jobs of another kind have another.

    Entering raises `UserError` (`output_in_use`) if another job is alive. Of jobs that enter at the same moment one is
    refused; in a bucket both may go on for up to `RENEW_S`, and do some fragments twice, with the same labels.
    """

    def __init__(self, folder: urls.Location, name: str = RUNNING):
        self._folder, self._name = folder, name
        self._path = urls.join(folder, name)
        self._started = time.time()
        self._token = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.state: dict[str, Any] = {}
        self.is_lost = False

    def __enter__(self) -> Self:
        if (other := read_claim(self._folder, self._name)) is not None:
            raise _in_use(other)
        files.remove(self._path)  # of a job that is dead
        if urls.is_url(self._path):
            self._renew()
        else:
            files.make_folder(self._folder)
            with suppress(FileExistsError):  # of a job that came at the same moment
                descriptor = os.open(files.filesystem(self._path)[1], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                with os.fdopen(descriptor, "w") as file:
                    file.write(self._text())
            time.sleep(SETTLE_S)  # for another one that took the dead job's claim for its own and removed ours
        self.check()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(UserError):
            if self._is_mine():
                files.remove(self._path)

    def check(self) -> None:
        """Raises `UserError` (`output_in_use`) if another job has taken the folder."""
        if self.is_lost or not self._is_mine():
            other = _read(self._path)
            raise (
                _in_use(other)
                if other
                else UserError(
                    "the output folder was taken by another job, which has ended since; run again", "output_in_use"
                )
            )

    def _is_mine(self) -> bool:
        claim = _read(self._path)
        return claim is not None and claim["token"] == self._token

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(UserError):  # a store that is away for a moment
                claim = _read(self._path)
                if claim is not None and claim["token"] != self._token:
                    self.is_lost = True
                    return
                self._renew()

    def _renew(self) -> None:
        files.write_bytes(self._path, self._text().encode(), durable=False)

    def _text(self) -> str:
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "token": self._token,
                "started": self._started,
                "renewed": time.time(),
                "state": self.state,
            }
        )


def _in_use(other: dict[str, Any]) -> UserError:
    ago = time.time() - other["renewed"]
    return UserError(
        f"the output folder is being written by process {other['pid']} on {other['host']}, which renewed its claim "
        f"{ago:.0f} s ago; wait for it or stop it (after a kill, try again in {STALE_S:.0f} s), or give another output "
        "folder",
        "output_in_use",
    )
