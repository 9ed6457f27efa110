"""How many requests an ingress replica works on, how many wait for it, and the answer to the others.

Serve has the same limits, but its proxy refuses in plain text: here every refusal has our envelope.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lumen_ray.serve.http import error_response
from lumen_ray.serve.job import sender
from lumen_ray.serve.metrics import INSIDE, REFUSALS, STAGE_SECONDS
from lumen_ray.serve.settings import Deployment, ServeSettings


def ingress_options(settings: ServeSettings, deployment: Deployment | None = None) -> dict[str, Any]:
    """Keyword arguments of `ray.serve.deployment` for the one that has the HTTP API, by default `settings.ingress`,
    whose limits it applies itself."""
    deployment = deployment or settings.ingress
    return {**deployment.options(), "backpressure_config": {"retry_after_s": settings.http.retry_after_s}}


class Gate:
    """The requests that are worked on or wait in one replica, within the limits of `settings.ingress`."""

    def __init__(self, settings: ServeSettings):
        limits = settings.ingress
        self.retry_after_s = settings.http.retry_after_s
        #: whether the replica is about to stop and takes no more requests
        self.is_closed = False
        self.inside = 0
        self._most_at_work = limits.max_ongoing_requests
        self._most_inside: float = limits.max_ongoing_requests + limits.max_queued_requests
        if limits.max_queued_requests < 0:
            self._most_inside = float("inf")
        self._slots = asyncio.Semaphore(limits.max_ongoing_requests)

    def refusal(self) -> tuple[str, str] | None:
        """Reason and message of the error for another request; None if it may come in."""
        if self.is_closed:
            return "shutting_down", "the server is shutting down; try again shortly, or ask another one"
        if self.inside >= self._most_inside:
            return "overloaded", "the server is at its limit of waiting requests; try again shortly"
        return None

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits until the request may be worked on."""
        self._count(1)
        start = perf_counter()
        try:
            async with self._slots:
                STAGE_SECONDS.record(perf_counter() - start, stage="queue")
                yield
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        self.inside += more
        waiting = max(0, self.inside - self._most_at_work)
        INSIDE.record(waiting, state="waiting")
        INSIDE.record(self.inside - waiting, state="working")


class Admission:
    """Middleware that lets POST requests through a gate, and refuses others with 503 before their body is read. Health,
    pages and listings are always answered."""

    def __init__(self, app: ASGIApp, gate: Gate):
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif refusal := self.gate.refusal():
            REFUSALS.record(by="ingress")
            headers = {"Retry-After": str(self.gate.retry_after_s)}
            await error_response(*refusal, scope["lumen_request_id"], headers)(scope, receive, send)
        else:
            async with self.gate.slot():
                key = scope.get("lumen_key")
                sender.set(f"request {scope['lumen_request_id']}" if key is None else f"key {key}")
                await self.app(scope, receive, send)
