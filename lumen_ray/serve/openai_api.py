"""`/v1/chat/completions` in OpenAI's format (see `wire.chat`).

Parameters of sampling are refused unless the server's setting `openai_sampling` is on. Answers come in one piece, or as
server-sent events while they are written.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lumen_ray.answer import Answer
from lumen_ray.serve.asking import Backend, ask, ask_streaming
from lumen_ray.serve.http import error_of, json_schema_ref
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire import chat, schemas

Piece = str | tuple[Answer, dict[str, Any]]
#: proxies in front of the server pass events on at once
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    router = APIRouter(prefix="/v1")
    body = {"required": True, "content": {"application/json": {"schema": json_schema_ref(chat.ChatRequest)}}}

    @router.post(
        "/chat/completions",
        tags=["openai"],
        summary="A conversation about images or in text alone, in OpenAI's format",
        openapi_extra={"requestBody": body},
    )
    async def chat_completions(request: Request) -> Response:
        asked = chat.parse_chat(schemas.parse_json(await request.body()), settings.openai_sampling, takes_stream=True)
        await check_model(backend, asked.model)
        read = partial(chat.read_chat, asked, settings.limits)
        if not asked.stream:
            answers, extra = await ask(backend, settings, read)
            completion = chat.completion(asked, answers[0], extra["model"])
            completion["lumen"] |= {name: value for name, value in extra.items() if name != "model"}
            return JSONResponse(completion)
        info = await backend.info()
        chunks = chat.Chunks(asked, f"{info['preset']}@{info['version']}")
        pieces = ask_streaming(backend, settings, read)
        try:
            first = await anext(pieces)  # errors of the request still have their status
        except BaseException:
            await pieces.aclose()
            raise
        events = _events(request, chunks, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers=_EVENT_HEADERS)

    return router


async def _events(
    request: Request, chunks: chat.Chunks, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncIterator[bytes]:
    """Server-sent events of an answer; one with an error in our envelope is the last of an answer that fails."""
    async with aclosing(pieces):
        yield _event(chunks.begin())
        piece: Piece | None = first
        try:
            while piece is not None:
                if isinstance(piece, str):
                    yield _event(chunks.text(piece))
                else:
                    answer, extra = piece
                    for chunk in chunks.end(answer, {name: v for name, v in extra.items() if name != "model"}):
                        yield _event(chunk)
                piece = await anext(pieces, None)
        except Exception as error:  # the status has been sent
            yield _event(await error_of(request, error))
            return
        yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "backslashreplace")


async def check_model(backend: Backend, name: str | None) -> None:
    """Raises `UserError` if a request names another model than the loaded one."""
    info = await backend.info()
    chat.check_model(name, info["preset"], info["version"])
