"""Deployments that scale to zero: ready without a replica, and the header of answers that waited for one to start.

Neither asks the deployment itself: a ping would start a replica, or keep the last one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: names the deployments that a request has woken
HEADER = "X-Lumen-Cold-Start"
#: seconds for Serve's controller to answer
_WAIT_S = 5.0

#: the deployments that the HTTP request of this context has waited for, in their order
woken: ContextVar[list[str] | None] = ContextVar("woken", default=None)


@dataclass(frozen=True)
class State:
    """A deployment as Serve's controller sees it. `is_healthy`: whether its replicas can be started."""

    running: int
    is_healthy: bool


class Sleeper:
    """The readiness of a deployment that may have no replica; stands in for `readiness.Readiness`."""

    def __init__(
        self,
        state: Callable[[], Awaitable[State]],
        awake_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`awake_s`: seconds for which a replica lives on after an answer, at least."""
        self._state, self._awake_s, self._clock = state, awake_s, clock
        self._answered = -math.inf
        #: whether it had no replica when it was last looked at
        self.is_asleep = False

    def answered(self) -> None:
        """To be called for every answer of the deployment."""
        self._answered = self._clock()
        self.is_asleep = False

    async def check(self) -> bool:
        """Whether the deployment takes requests, at once or when a replica has started."""
        try:
            state = await asyncio.wait_for(self._state(), _WAIT_S)
        except TimeoutError:
            return False
        self.is_asleep = not state.running
        return state.is_healthy

    async def is_woken(self) -> bool:
        """Whether a request that is sent now has to wait for a replica to start."""
        if self._clock() - self._answered < self._awake_s:
            return False
        await self.check()
        return self.is_asleep


class Woken:
    """Middleware: the header of answers that have waited. That of a stream does not name decoders: it is sent before
    one is asked."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names: list[str] = []
        token = woken.set(names)

        async def telling_send(message: Message) -> None:
            if message["type"] == "http.response.start" and names:
                told = ", ".join(dict.fromkeys(names))
                message["headers"] = [*message.get("headers", []), (HEADER.lower().encode(), told.encode())]
            await send(message)

        try:
            await self.app(scope, receive, telling_send)
        finally:
            woken.reset(token)
