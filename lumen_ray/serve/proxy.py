"""Middleware of Ray Serve's proxy: what it answers by itself gets the envelope of all errors of its route.

The proxy has no say in most answers. But it answers in plain text where no application is at a path, and where a
deployment is gone; when an ingress replica dies under a request, it answers nothing, and its HTTP server says
"Internal Server Error". Serve takes this module by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.serve.envelopes import Envelopes
from lumen_ray.serve.http import error_response, header

#: status of the proxy -> reason and message
_ANSWERS = {
    404: ("not_found", "there is no application at this path; check the address"),
    408: ("timeout", "the server did not answer in time; ask for less or try again"),
    503: ("unavailable", "the server cannot take requests now; try again"),
}
_RETRY_AFTER_S = "1"
_LOST = ("unavailable", "the replica that had this request was lost; try again")


def middlewares() -> list[Middleware]:
    """Called by each proxy at its start."""
    return [Middleware(Envelope), Middleware(Envelopes)]  # the last is the outermost


class Envelope:
    """Replaces plain-text errors, and gives an answer where there is none. Serve's own routes below `/-/` are left."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def watched_send(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                if answer := _ANSWERS.get(message["status"]) if _is_plain(message) else None:
                    replaced = True
                    await _answer(answer, message["headers"], scope, receive, send)
            if not replaced:
                await send(message)

        await self.app(scope, receive, watched_send)
        if not started:
            await _answer(_LOST, (), scope, receive, send)


def _is_plain(message: Message) -> bool:
    return any(key.lower() == b"content-type" and value.startswith(b"text/plain") for key, value in message["headers"])


async def _answer(
    answer: tuple[str, str], given: Iterable[Sequence[bytes]], scope: Scope, receive: Receive, send: Send
) -> None:
    """Sends an error; of the headers `given`, Retry-After is kept."""
    identity = header(scope, b"x-request-id") or uuid.uuid4().hex  # Serve's middleware inside this one has set it
    headers = {"X-Request-ID": identity}
    if answer[0] == "unavailable":
        told = [value.decode() for key, value in given if key.lower() == b"retry-after"]
        headers["Retry-After"] = told[0] if told else _RETRY_AFTER_S
    await error_response(*answer, identity, headers)(scope, receive, send)
