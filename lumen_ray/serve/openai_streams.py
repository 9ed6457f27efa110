"""Answers as server-sent events in OpenAI's formats, while they are written."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse

from lumen_ray.answer import Answer
from lumen_ray.serve.asking import Backend, ask_streaming
from lumen_ray.serve.http import error_of
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire.requests import Asked

Piece = str | tuple[Answer, dict[str, Any]]
#: proxies in front of the server pass events on at once
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Events(Protocol):
    """The events of one response, as objects; those with a `type` are named by it. `ending`: sent behind the last."""

    ending: bytes

    def begin(self) -> Iterator[dict[str, Any]]:
        """The events before the first text."""

    def text(self, new: str) -> Iterator[dict[str, Any]]:
        """The events of new text."""

    def end(self, answer: Answer, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events behind the last text, with the response's fields `extra`, of which `model` is the one that has
        answered."""

    def failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of an answer that fails, from the body of the error."""


async def stream(
    request: Request, backend: Backend, settings: ServeSettings, read: Callable[[], Asked], events: Events
) -> StreamingResponse:
    """The response to a request whose single task `read` finds. What is wrong with it is raised before the response
    begins, so that it has its status."""
    pieces = ask_streaming(backend, settings, read)
    try:
        first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    sent = _sent(request, events, first, pieces)
    return StreamingResponse(sent, media_type="text/event-stream", headers=_HEADERS)


async def _sent(
    request: Request, events: Events, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncIterator[bytes]:
    """The events in bytes; one with an error in our envelope is the last of an answer that fails."""
    async with aclosing(pieces):
        for event in events.begin():
            yield _event(event)
        piece: Piece | None = first
        try:
            while piece is not None:
                for event in _of_piece(events, piece):
                    yield _event(event)
                piece = await anext(pieces, None)
        except Exception as error:  # the status has been sent
            yield _event(events.failed(await error_of(request, error)))
            return
        if events.ending:
            yield events.ending


def _of_piece(events: Events, piece: Piece) -> Iterator[dict[str, Any]]:
    if isinstance(piece, str):
        return events.text(piece)
    return events.end(*piece)


def _event(data: dict[str, Any]) -> bytes:
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "backslashreplace")
