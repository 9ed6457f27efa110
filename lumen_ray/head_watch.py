"""Says when the head of a Ray cluster is lost: Ray's core ends this process a minute later, without a word."""

from __future__ import annotations

import socket
import sys
import threading

PERIOD_S = 5.0
_watch: _HeadWatch | None = None


class _HeadWatch(threading.Thread):
    """Looks every few seconds whether `address`, HOST:PORT of the head's GCS, takes connections; prints a line when it
    has not twice in a row, and another one when it does again."""

    def __init__(self, address: str):
        super().__init__(name="head-watch", daemon=True)
        self.address = address
        self.ended = threading.Event()

    def run(self) -> None:
        failures = 0
        while not self.ended.wait(PERIOD_S):
            before, failures = failures, 0 if _answers(self.address) else failures + 1
            if failures == 2:
                _say(
                    f"the head of the Ray cluster at {self.address} does not answer; this command ends in about a "
                    "minute unless it is back; run it again then"
                )
            elif before >= 2 and not failures:
                _say(f"the head of the Ray cluster at {self.address} answers again")


def start(address: str) -> None:
    """Watches the head at `address`, in place of one that is watched already."""
    global _watch
    stop()
    _watch = _HeadWatch(address)
    _watch.start()


def stop() -> None:
    """Ends watching, before this process leaves the cluster."""
    if _watch is not None:
        _watch.ended.set()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PERIOD_S).close()
    except OSError:
        return False
    return True


def _say(text: str) -> None:
    print(f"lumen-ray: {text}", file=sys.stderr, flush=True)
