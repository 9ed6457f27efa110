"""`/v1/chat/completions` and `/v1/responses` in OpenAI's formats (see `wire.chat` and `wire.responses`), and the tools
of both.

Parameters of sampling are refused unless the server's setting `openai_sampling` is on. Answers come in one piece, or as
server-sent events while they are written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lumen_ray.serve.asking import Backend, ask
from lumen_ray.serve.http import json_schema_ref
from lumen_ray.serve.job import pinned
from lumen_ray.serve.openai_streams import stream
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire import chat, responses, schemas
from lumen_ray.wire.completions import Chunks, completion
from lumen_ray.wire.limits import check_messages
from lumen_ray.wire.response_events import ResponseEvents
from lumen_ray.wire.tools import ToolUse, describe_tools

T = TypeVar("T")
BODIES = (chat.ChatRequest, responses.ResponsesRequest)


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/chat/completions",
        summary="A conversation about images or in text alone, in OpenAI's format",
        openapi_extra=_body(chat.ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        body = await request.body()
        asked = await asyncio.to_thread(read_body, body, "messages", partial(chat.parse_chat, takes_stream=True))
        model = await check(asked.model, asked.tool_use)
        read = partial(chat.read_chat, asked, settings.limits)
        if asked.stream:
            return await stream(request, backend, settings, read, Chunks(asked, model))
        answers, extra = await ask(backend, settings, read)
        whole = completion(asked, answers, extra.pop("model"))
        whole["lumen"] |= extra
        return JSONResponse(whole)

    @router.post(
        "/responses",
        summary="The same in OpenAI's newer format; nothing is stored",
        openapi_extra=_body(responses.ResponsesRequest),
    )
    async def create_response(request: Request) -> Response:
        asked = await asyncio.to_thread(read_body, await request.body(), "input", responses.parse_responses)
        model = await check(asked.chat.model, asked.tools)
        read = partial(chat.read_chat, asked.chat, settings.limits, tools=asked.tools, places=asked.places)
        writer = ResponseEvents(asked, model)
        if asked.chat.stream:
            return await stream(request, backend, settings, read, writer)
        answers, extra = await ask(backend, settings, read)
        return JSONResponse(writer.response(answers[0], extra))

    @router.get("/tools", summary="The tools of the loaded model, to be put into a request, and schemas of results")
    async def tools() -> dict[str, Any]:
        return describe_tools((await backend.info())["tasks"])

    def read_body(body: bytes, field: str, parse: Callable[[dict[str, Any], bool], T]) -> T:
        """What `parse` makes of a body with the conversation in `field`; in a thread, as it may be long."""
        data = schemas.parse_json(body)
        check_messages(data.get(field), field, settings.limits)
        return parse(data, settings.openai_sampling)

    async def check(name: str | None, use: ToolUse) -> str:
        """Returns preset@version of the model. Raises `UserError` if a request names another model, or tools that it
        does not have."""
        await check_model(backend, name)
        info = await backend.info()
        use.check_served(info["tasks"])
        return f"{info['preset']}@{info['version']}"

    return router


def _body(model: type) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": json_schema_ref(model)}}}}


async def check_model(backend: Backend, name: str | None) -> None:
    """Raises `UserError` if a request names another model than the loaded one. If it names the version too, no other
    may answer it."""
    info = await backend.info()
    chat.check_model(name, info["preset"], info["version"])
    if name is not None and name != info["preset"]:
        pinned.set(info["version"])
