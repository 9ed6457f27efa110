"""Whether a deployment takes requests, as one ingress replica sees it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from enum import Enum

#: seconds for a ping, where nothing was answered lately
WAIT_S = 5.0
#: for a ping where something was answered lately: probes of Kubernetes wait for 1 s by default
_SHORT_WAIT_S = 0.5


class Ping(Enum):
    """The answer to a ping. It stands in the deployment's queue like any request, so an overloaded one says nothing."""

    FINE = "fine"
    STUCK = "stuck"  # a replica whose model does not get on
    BUSY = "busy"  # refused, since too many requests wait
    GONE = "gone"  # no replica, or one that has died


class Readiness:
    """A deployment is ready if it answers a ping, or is too busy to but has answered lately. One whose replicas are
    gone, or have answered nothing for `patience_s`, is not.

    Overload is no reason to be taken out of the balancing: it would be for all ingress replicas at once, and for the
    next server, which gets their load.
    """

    def __init__(
        self,
        ping: Callable[[], Awaitable[Ping]],
        is_running: Callable[[], Awaitable[bool]],
        patience_s: float,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`ping`: asks one replica; `is_running`: whether there is a replica at all, asked where a ping tells nothing;
        `patience_s`: how long ago an answer may be; `wait_s`: for a ping, where nothing was answered lately."""
        self._ping, self._is_running, self._patience_s = ping, is_running, patience_s
        self._wait_s, self._clock = wait_s, clock
        self._answered = self._fine = -math.inf
        self._asked: asyncio.Task[Ping] | None = None

    def answered(self) -> None:
        """To be called for every answer of the deployment but those to pings."""
        self._answered = self._clock()

    async def check(self) -> bool:
        """Whether the deployment takes requests. Returns after `wait_s` and the time of `is_running` at the latest."""
        # one ping at a time: those that wait in a full queue would pile up there
        asked = self._asked = self._asked or asyncio.create_task(self._ask())
        lately = self._since(max(self._answered, self._fine)) <= self._patience_s
        await asyncio.wait({asked}, timeout=min(_SHORT_WAIT_S, self._wait_s) if lately else self._wait_s)
        found = Ping.BUSY
        if asked.done():
            if self._asked is asked:
                self._asked = None
            found = asked.result()
        match found:
            case Ping.FINE:
                return True
            case Ping.GONE:
                return False
            case Ping.STUCK:  # others of its replicas may get on; pings do not tell, which reach a stuck one too
                last = self._answered
            case Ping.BUSY:
                last = max(self._answered, self._fine)
        return self._since(last) <= self._patience_s and await self._is_running()

    def _since(self, moment: float) -> float:
        return self._clock() - moment

    async def _ask(self) -> Ping:
        found = await self._ping()
        if found is Ping.FINE:
            self._fine = self._clock()
        return found
