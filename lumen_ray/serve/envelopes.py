"""Errors of the routes that speak another API, in that API's own envelope.

Whatever refuses a request (a route, the body limit, the gate, an unknown path), its error is ours
(`http.error_response`); here it gets the shape that the clients of a route read. Status and headers stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.serve.http import local_path

#: from the fields of `schemas.ErrorBody` to the body of the other API's error
Envelope = Callable[[dict[str, Any]], dict[str, Any]]


class Envelopes:
    """Middleware around all that refuses requests. `envelopes`: by the first segment of the path, such as ``hf``."""

    def __init__(self, app: ASGIApp, envelopes: Mapping[str, Envelope]):
        self.app = app
        self.envelopes = envelopes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = local_path(scope).lstrip("/").partition("/")[0] if scope["type"] == "http" else ""
        envelope = self.envelopes.get(first)
        if envelope is None:
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        held = bytearray()

        async def reshaping_send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                held.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    body = _reshaped(bytes(held), envelope)
                    await send({**start, "headers": _with_length(start, len(body))})
                    await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, reshaping_send)


def _reshaped(body: bytes, envelope: Envelope) -> bytes:
    """The error in the other envelope; a body that is no error of ours, such as that of a health route, as it is."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body
    return json.dumps(envelope(error), ensure_ascii=False).encode() if isinstance(error, dict) else body


def _with_length(start: Message, length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in start.get("headers", []) if name.lower() != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]
