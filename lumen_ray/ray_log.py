"""Keeps the log lines of Ray's libraries and of its C++ core off the terminal, in a file of Ray's session.

`LUMEN_RAY_WORKER_LOGS=1` shows them on the terminal, those of the workers too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_STDERR = 2


def on_terminal() -> bool:
    """Whether the user wants Ray's lines on the terminal."""
    return os.environ.get("LUMEN_RAY_WORKER_LOGS") == "1"


def log_file() -> Path:
    """The file of this process's Ray lines: among the logs of Ray's session, where those can be written."""
    from ray._private import worker

    node = worker._global_node
    folder = Path(node.get_logs_dir_path()) if node is not None else None  # none: a client of a remote cluster
    if folder is None or not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    return folder / f"lumen-ray-{os.getpid()}.log"


def quiet_loggers() -> None:
    """Limits the terminal handlers of Ray's libraries to errors. Call it after `ray.serve` is imported, too.

    Ray Data and Ray Train have log files; Ray Serve has none in this process, so its lines go to `log_file()`.
    """
    if on_terminal():
        return
    for name in ("ray.data", "ray.train", "ray.serve"):
        for handler in _terminal_handlers(name):
            handler.setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.util").setLevel(logging.ERROR)
    serve, path = logging.getLogger("ray.serve"), str(log_file())
    if _terminal_handlers("ray.serve") and path not in (getattr(h, "baseFilename", None) for h in serve.handlers):
        for handler in [h for h in serve.handlers if isinstance(h, logging.FileHandler)]:  # of a session that has ended
            serve.removeHandler(handler)
            handler.close()
        file_handler = logging.FileHandler(path, delay=True)
        file_handler.setFormatter(_terminal_handlers("ray.serve")[0].formatter)
        serve.addHandler(file_handler)


def _terminal_handlers(name: str) -> list[logging.Handler]:
    handlers = logging.getLogger(name).handlers
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]


class _Redirection:
    """File descriptor 2, pointed at a log file while at least one user needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._terminal = -1  # a copy of the descriptor
        self._python: tuple[TextIO, TextIO] | None = None  # `sys.stderr` before, and its stand-in

    def enter(self, path: Path) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._terminal = os.dup(_STDERR)
            if _descriptor(sys.stderr) == _STDERR:
                sys.stderr.flush()
                stand_in = open(os.dup(self._terminal), "w", buffering=1, encoding=sys.stderr.encoding)  # noqa: SIM115
                self._python = sys.stderr, stand_in
                sys.stderr = stand_in
            with path.open("ab") as file:
                os.dup2(file.fileno(), _STDERR)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if self._python is not None:
                before, stand_in = self._python
                before.flush()
                if sys.stderr is stand_in:
                    sys.stderr = before
                stand_in.flush()
                self._python = None
            os.dup2(self._terminal, _STDERR)
            os.close(self._terminal)


_redirection = _Redirection()


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by an object that is no file
        return None


@contextlib.contextmanager
def native_lines_in_file() -> Iterator[None]:
    """Sends the lines that Ray's C++ core writes to file descriptor 2 to `log_file()`; `sys.stderr` stays as it is.

    Ray has no setting for them: its driver copies errors to that descriptor, among them harmless ones, such as the
    constructor arguments of Ray Data's actors (ray#53727).
    """
    if on_terminal() or not _is_open(_STDERR):
        yield
        return
    _redirection.enter(log_file())
    try:
        yield
    finally:
        _redirection.leave()


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
