"""How many requests one replica of the trunk or a decoder works on, how many wait for that, and the refusal of others.

Serve has the same two limits, but requests over the first wait in the callers' routers, which ask replicas for room at
growing intervals, up to half a second apart: one that is done with its requests stands idle until it has answered. So
Serve hands all of them to the replica, where the next one begins at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lumen_ray.serve.http import Overloaded


class _WithoutRefusals(logging.Filter):
    """Serve logs the traceback of every exception of a replica, of refusals too, which come by the thousand."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], Overloaded))


_WITHOUT_REFUSALS = _WithoutRefusals()


class Room:
    """The requests in one replica, first come, first served. `queued`: -1 for any number."""

    def __init__(self, ongoing: int, queued: int, retry_after_s: int = 1):
        logging.getLogger("ray.serve").addFilter(_WITHOUT_REFUSALS)
        self.inside = 0
        self._most = float("inf") if queued < 0 else ongoing + queued
        self._retry_after_s = retry_after_s
        self._slots = asyncio.Semaphore(ongoing)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits until the request may be worked on. Raises `Overloaded` if too many wait already."""
        if self.inside >= self._most:
            message = "the server is at its limit of waiting requests; try again shortly"
            raise Overloaded(message, self._retry_after_s)
        self.inside += 1
        try:
            async with self._slots:
                yield
        finally:
            self.inside -= 1
