"""How many requests an ingress replica works on, how many wait for it, and the answer to the others.

Serve has the same limits, but its proxy refuses in plain text: here every refusal has our envelope.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lumen_ray.serve.http import error_response
from lumen_ray.serve.settings import Deployment, ServeSettings

#: requests that Serve hands to a replica beyond its limits, so that they are refused there
_REFUSED_AT_ONCE = 256
#: requests that wait in a proxy for an ingress replica, if even refusing is too slow
_PROXY_QUEUE = 4096


def ingress_options(settings: ServeSettings) -> dict[str, Any]:
    """Keyword arguments of `ray.serve.deployment` for the ingress, which applies its limits itself."""
    most = settings.ingress.max_ongoing_requests + max(settings.ingress.max_queued_requests, 0)
    return {
        **settings.ingress.options(),
        "max_ongoing_requests": most + _REFUSED_AT_ONCE,
        "max_queued_requests": _PROXY_QUEUE,
        "backpressure_config": {"retry_after_s": settings.http.retry_after_s},
    }


class Admission:
    """Middleware that admits POST requests: some are worked on, others wait, and more get 503 before their body is
    read. Health, pages and listings are always answered."""

    def __init__(self, app: ASGIApp, limits: Deployment, retry_after_s: int):
        self.app = app
        self.most_waiting = limits.max_queued_requests
        self.retry_after_s = retry_after_s
        self._slots = asyncio.Semaphore(limits.max_ongoing_requests)
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self._slots.locked() and 0 <= self.most_waiting <= self._waiting:
            message = "the server is at its limit of waiting requests; try again shortly"
            headers = {"Retry-After": str(self.retry_after_s)}
            await error_response("overloaded", message, scope["lumen_request_id"], headers)(scope, receive, send)
            return
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._slots.release()
