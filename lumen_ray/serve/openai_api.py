"""`/v1/chat/completions` in OpenAI's format (see `wire.chat`).

Parameters of sampling are refused unless the server's setting `openai_sampling` is on. Answers come in one piece.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from lumen_ray.serve.http import json_schema_ref
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.serve.task_api import Backend, ask
from lumen_ray.wire import chat, schemas


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    router = APIRouter(prefix="/v1")
    body = {"required": True, "content": {"application/json": {"schema": json_schema_ref(chat.ChatRequest)}}}

    @router.post(
        "/chat/completions",
        tags=["openai"],
        summary="A conversation about images or in text alone, in OpenAI's format",
        openapi_extra={"requestBody": body},
    )
    async def chat_completions(request: Request) -> dict[str, Any]:
        asked = chat.parse_chat(schemas.parse_json(await request.body()), settings.openai_sampling)
        await check_model(backend, asked.model)
        answers, extra = await ask(backend, settings, partial(chat.read_chat, asked, settings.limits))
        completion = chat.completion(asked, answers[0], extra["model"])
        completion["lumen"]["timing_ms"] = extra["timing_ms"]
        return completion

    return router


async def check_model(backend: Backend, name: str | None) -> None:
    """Raises `UserError` if a request names another model than the loaded one."""
    info = await backend.info()
    chat.check_model(name, info["preset"], info["version"])
