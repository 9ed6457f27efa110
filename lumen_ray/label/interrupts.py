"""Ctrl-C of a label job: the first ends it in order, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

#: exit status of a command that Ctrl-C ended
STOPPED = 130


@contextmanager
def stopped_in_two_steps() -> Iterator[None]:
    """The first Ctrl-C raises `KeyboardInterrupt` as usual and says that the second does not wait for the workers: it
    ends this process, and with it those that Ray started for it.

    Nothing that is done is lost by that, as by a kill: a fragment is published whole or not at all. Other threads than
    the main one, and programs with a handler of their own, are left alone.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _first)
    try:
        yield
    finally:
        # once there was a Ctrl-C, the second one holds until the process has ended, for which Ray takes seconds
        if signal.getsignal(signal.SIGINT) is _first:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _first(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _second)
    _tell("stopping, which may take as long as the images in work; Ctrl-C again to stop at once")
    raise KeyboardInterrupt


def _second(number: int, frame: FrameType | None) -> None:
    _tell("stopped; run the same command again to continue")
    os._exit(STOPPED)


def _tell(text: str) -> None:
    """Says it past `sys.stderr`, which may be in the midst of a write, or whose reader may have been stopped too."""
    with suppress(OSError):
        os.write(2, f"lumen-ray: {text}\n".encode())
