"""How many requests one replica of the trunk or a decoder works on, how many wait for that, and the refusal of others.

Serve has the same two limits, but requests over the first wait in the callers' routers, which look for a free replica
at growing intervals, up to half a second apart, and wait for its answer: a replica that is done with its requests stands
idle until then. So Serve hands all of them to the replica, where the next one begins at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lumen_ray.serve.http import Overloaded


class Room:
    """The requests in one replica, first come, first served. `queued`: -1 for any number."""

    def __init__(self, ongoing: int, queued: int, retry_after_s: int = 1):
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
