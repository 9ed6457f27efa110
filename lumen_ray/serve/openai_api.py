"""`/v1/chat/completions` in OpenAI's format, as far as the model supports it: one user message with text and one image.

Unsupported fields are refused, not ignored. Answers are decoded greedily and in one piece, so `stream: true` is a 400.
When the LLM routes the prompt to a decoder, `content` is empty and the instances are in the extension field `lumen`.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.serve import schemas
from lumen_ray.serve.http import json_schema_ref
from lumen_ray.serve.images import image_bytes
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.serve.task_api import Backend, answer


class ImageUrl(Settings):
    url: str = Field(description="a data URL or base64; remote URLs are refused")
    detail: str | None = Field(None, description="accepted and without effect: images have one input size")


class Part(Settings):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ChatMessage(Settings):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None


class ChatRequest(Settings):
    """One question about one image."""

    model: str | None = Field(None, description="the preset from GET /v1/models; null for the model that is loaded")
    messages: list[ChatMessage] = Field(min_length=1, description="exactly one user message with text and one image")
    max_tokens: int | None = Field(None, ge=1, le=1024, description="longest answer, in tokens of the model")
    max_completion_tokens: int | None = Field(None, ge=1, le=1024, description="the newer name of max_tokens")
    temperature: float | None = Field(None, description="0 or null: decoding is greedy")
    n: int | None = Field(None, description="1 or null")
    stream: bool | None = Field(None, description="false or null: answers come in one piece")
    user: str | None = Field(None, description="accepted and without effect")
    seed: int | None = Field(None, description="accepted and without effect: decoding is deterministic")


def make_router(backend: Backend, settings: ServeSettings) -> APIRouter:
    router = APIRouter(prefix="/v1")
    body = {"required": True, "content": {"application/json": {"schema": json_schema_ref(ChatRequest)}}}

    @router.post(
        "/chat/completions",
        tags=["openai"],
        summary="One question about one image, in OpenAI's format",
        openapi_extra={"requestBody": body},
    )
    async def chat_completions(request: Request) -> dict[str, Any]:
        chat = schemas.parse(ChatRequest, schemas.parse_json(await request.body()))
        _refuse_unsupported(chat)
        await check_model(backend, chat.model)
        question, image = _question_and_image(chat.messages)
        fields = schemas.TaskFields(text=question, max_new_tokens=chat.max_completion_tokens or chat.max_tokens)
        answers, extra = await answer(backend, settings, image, [("chat", fields)])
        return _completion(answers[0].to_dict(), extra)

    return router


async def check_model(backend: Backend, name: str | None) -> None:
    """Raises `UserError` if a request names another model than the loaded one."""
    info = await backend.info()
    if name is not None and name not in (info["preset"], f"{info['preset']}@{info['version']}"):
        raise UserError(f"unknown model '{name}'; models: {info['preset']}", "unknown_model")


def _refuse_unsupported(chat: ChatRequest) -> None:
    if chat.stream:
        raise UserError("answers are not streamed; leave 'stream' out or set it to false", "streaming_unsupported")
    if chat.n not in (None, 1):
        raise UserError(
            "decoding is greedy, so there is one answer; leave 'n' out or set it to 1", "unsupported_parameter"
        )
    if chat.temperature:
        raise UserError("decoding is greedy; leave 'temperature' out or set it to 0", "unsupported_parameter")


def _question_and_image(messages: list[ChatMessage]) -> tuple[str, bytes]:
    """The text and the image of the single user message; raises `UserError` for any other conversation."""
    roles = [message.role for message in messages]
    if roles != ["user"]:
        raise UserError(
            f"the model takes exactly one user message, no system message or history; got roles {', '.join(roles)}",
            "unsupported_conversation",
        )
    content = messages[0].content
    parts = [Part(type="text", text=content)] if isinstance(content, str) else content
    question = " ".join(part.text for part in parts if part.type == "text" and part.text)
    images = [part.image_url for part in parts if part.type == "image_url"]
    if len(images) != 1 or images[0] is None:
        raise UserError(f"the message needs exactly one part of type 'image_url', got {len(images)}", "missing_image")
    return question, image_bytes(images[0].url)


def _completion(result: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The response in OpenAI's format, without token usage, which is not measured."""
    message = {"role": "assistant", "content": result.get("text") or ""}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": extra["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "lumen": {**result, "timing_ms": extra["timing_ms"]},
    }
