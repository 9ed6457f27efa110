"""Errors of the routes that speak another API, in that API's own envelope.

Whatever refuses a request (a route, the body limit, the gate, an unknown path), its error is ours
(`http.error_response`); here it gets the shape that the clients of a route read. Status and headers stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumen_ray.serve.http import local_path

#: from the fields of `schemas.ErrorBody` to the body of the other API's error
Envelope = Callable[[dict[str, Any]], dict[str, Any]]


def _hugging_face(error: dict[str, Any]) -> dict[str, Any]:
    return {"error": error["message"], "error_type": error["reason"]}


def _roboflow(error: dict[str, Any]) -> dict[str, Any]:
    return {"message": error["message"], "reason": error["reason"], "request_id": error["request_id"]}


def _kserve(error: dict[str, Any]) -> dict[str, Any]:
    return {"error": error["message"]}


#: by the first segment of the path
_ENVELOPES: dict[str, Envelope] = {
    "hf": _hugging_face,
    **dict.fromkeys(("infer", "model", "yolo_world", "sam3", "info"), _roboflow),
    "v2": _kserve,
}


class Envelopes:
    """Middleware around all that refuses requests."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = local_path(scope).lstrip("/").partition("/")[0] if scope["type"] == "http" else ""
        envelope = _ENVELOPES.get(first)
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
