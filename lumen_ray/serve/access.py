"""The outermost middleware: counts every answer, and writes a line about it where `http.access_log` is on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import perf_counter

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.serve.http import local_path
from lumen_ray.serve.metrics import FIRST_EVENT_SECONDS, KEY_REQUESTS, REQUEST_SECONDS, REQUESTS

#: its lines have fields, which Serve writes as JSON where its log encoding is JSON
logger = logging.getLogger("ray.serve.lumen.access")
#: status of a request whose client has left, as in nginx
_CLIENT_LEFT = 499


class Access:
    """Middleware. Paths without a route count as one, so that nobody can make up series."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], log: bool):
        """`routes`: of the application, for requests that are refused before they reach theirs."""
        self.app = app
        self.routes = routes
        self.log = log
        if log:
            logger.setLevel(logging.INFO)  # whatever the level of Serve's other lines is

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = perf_counter()
        status, size, is_stream, first, is_over = 0, 0, False, None, False

        async def watched_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and not is_over:
                status = _CLIENT_LEFT
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status, size, is_stream, first, is_over
            if message["type"] == "http.response.start":
                status = message["status"]
                is_stream = _is_stream(message)
            else:
                is_over = not message.get("more_body", False)
                size += len(message.get("body", b""))
                if is_stream and first is None and message.get("body"):
                    first = perf_counter() - start
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        except asyncio.CancelledError:
            status = _CLIENT_LEFT
            raise
        finally:
            self._count(scope, status, perf_counter() - start, first, size)

    def _count(self, scope: Scope, status: int, seconds: float, first: float | None, size: int) -> None:
        route, method, key = self._route(scope), _method(scope), scope.get("lumen_key")
        REQUESTS.record(method=method, route=route, status=str(status))
        REQUEST_SECONDS.record(seconds, route=route)
        if first is not None:
            FIRST_EVENT_SECONDS.record(first, route=route)
        if key is not None:
            KEY_REQUESTS.record(key=key, status=str(status))
        if not self.log:
            return
        client = scope.get("client")
        fields = {
            "request_id": scope.get("lumen_request_id", "-"),
            "method": method,
            "route": route,
            "path": local_path(scope)[:200],
            "status": status,
            "duration_ms": round(1000 * seconds, 1),
            "bytes_sent": size,
            "client": client[0] if client else None,
            "key": key,
        }
        logger.info(
            "%s %s %d %.1fms%s", method, route, status, 1000 * seconds, f" key={key}" if key else "", extra=fields
        )

    def _route(self, scope: Scope) -> str:
        """The path of the route, as "/v1/detect"; "other" for a request without one."""
        if (path := getattr(scope.get("route"), "path", None)) is not None:
            return str(path)
        found = max(self.routes, key=lambda route: route.matches(scope)[0].value)  # full, then with another method
        return "other" if found.matches(scope)[0] is Match.NONE else str(getattr(found, "path", "other"))


def _is_stream(message: Message) -> bool:
    kinds = [value for key, value in message.get("headers", []) if key.lower() == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


def _method(scope: Scope) -> str:
    return (
        scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
    )
