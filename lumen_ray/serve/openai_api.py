"""`/v1/chat/completions` in OpenAI's format, as far as the model supports it: one user message with text and one image.

Parameters that cannot be honoured are taken at their neutral value and refused at any other. Answers are decoded
greedily and in one piece. When the LLM routes the prompt to a decoder, `content` is empty and the instances are in the
extension field `lumen`.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.serve import schemas
from lumen_ray.serve.http import json_schema_ref
from lumen_ray.serve.images import image_bytes
from lumen_ray.serve.neutral import Neutral, refuse_others
from lumen_ray.serve.settings import MAX_NEW_TOKENS, ServeSettings
from lumen_ray.serve.task_api import Backend, answer

_UNUSED = "accepted and without effect"
_GREEDY = "decoding is greedy"
_NO_PENALTY = "tokens are not penalised"
_NO_LOGPROBS = "log probabilities are not returned"
_NO_TOOLS = "the model calls no tools"
_TEXT_ONLY = "answers are plain text"


class ImageUrl(Settings):
    url: str = Field(description="a data URL or base64; remote URLs are refused")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description=f"{_UNUSED}: images have one input size"
    )


def _as_image_url(value: Any) -> Any:
    """A plain text stands for its URL."""
    if isinstance(value, str):
        return {"url": value}
    if value is not None and not isinstance(value, dict):
        raise UserError("give an object with the data URL under 'url', or the data URL itself")
    return value


class Part(Settings):
    """A text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = Field(None, validate_default=True, description="of a part of type text")
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(_as_image_url, json_schema_input_type=str | ImageUrl | None)
    ] = Field(None, validate_default=True, description="of a part of type image_url; a text is its URL")
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=_UNUSED)

    @field_validator("text", "image_url")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        """A part has the field that its type names, and not the other one."""
        kind = info.data.get("type")  # absent if it is wrong, which is an error of its own
        if kind == info.field_name and value is None:
            raise UserError(f"a part of type '{kind}' needs this field")
        if kind is not None and kind != info.field_name and value is not None:
            raise UserError(f"a part of type '{kind}' does not take this field; give each part one of the two")
        return value


def _as_parts(content: Any) -> Any:
    """A plain text stands for a list of one part."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is not None and not isinstance(content, list):
        raise UserError("give a text, or a list of parts of type 'text' or 'image_url'")
    return content


class ChatMessage(Settings):
    """A message. Only one of the user is taken; keys of other roles are known, so that the error is about the role."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        list[Part] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
    ] = Field(None, description="the text and the image, in parts")
    name: str | None = Field(None, description=_UNUSED)
    refusal: Annotated[Any, Neutral("a user message holds no refusal", "")] = None
    audio: Annotated[Any, Neutral("a user message holds text and an image")] = None
    annotations: Annotated[Any, Neutral("a user message holds no annotations", [])] = None
    tool_calls: Annotated[Any, Neutral(_NO_TOOLS, [])] = None
    tool_call_id: Annotated[Any, Neutral(_NO_TOOLS, "")] = None
    function_call: Annotated[Any, Neutral(_NO_TOOLS)] = None


class ChatRequest(Settings):
    """One question about one image."""

    model: str | None = Field(None, description="the preset from GET /v1/models; null for the model that is loaded")
    messages: list[ChatMessage] = Field(min_length=1, description="exactly one user message with text and one image")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description=f"longest answer, in tokens of the model; more than {MAX_NEW_TOKENS} is {MAX_NEW_TOKENS}",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")

    temperature: Annotated[float | None, Neutral(_GREEDY, 0)] = None
    top_p: Annotated[float | None, Neutral(_GREEDY, 1)] = None
    n: Annotated[int | None, Neutral(f"{_GREEDY}, so there is one answer", 1)] = None
    frequency_penalty: Annotated[float | None, Neutral(_NO_PENALTY, 0)] = None
    presence_penalty: Annotated[float | None, Neutral(_NO_PENALTY, 0)] = None
    logit_bias: Annotated[Any, Neutral("the probabilities of tokens are not changed", {})] = None
    logprobs: Annotated[bool | None, Neutral(_NO_LOGPROBS, False)] = None
    top_logprobs: Annotated[int | None, Neutral(_NO_LOGPROBS, 0)] = None
    stop: Annotated[Any, Neutral("an answer ends where the model ends it", [])] = None
    stream: Annotated[bool | None, Neutral("answers are not streamed", False, reason="streaming_unsupported")] = None
    stream_options: Annotated[Any, Neutral("answers are not streamed")] = None
    response_format: Annotated[Any, Neutral(_TEXT_ONLY, {"type": "text"})] = None
    modalities: Annotated[Any, Neutral(_TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, Neutral(_TEXT_ONLY)] = None
    tools: Annotated[Any, Neutral(_NO_TOOLS, [])] = None
    functions: Annotated[Any, Neutral(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, Neutral(_NO_TOOLS, "none", "auto")] = None
    function_call: Annotated[Any, Neutral(_NO_TOOLS, "none", "auto")] = None
    prediction: Annotated[Any, Neutral("a predicted answer is not used")] = None
    reasoning_effort: Annotated[Any, Neutral("the model answers without reasoning", "none")] = None
    verbosity: Annotated[Any, Neutral("the length of answers cannot be steered", "medium")] = None
    web_search_options: Annotated[Any, Neutral("the model does not search the web")] = None
    moderation: Annotated[Any, Neutral("nothing is moderated")] = None
    store: Annotated[bool | None, Neutral("answers are not stored", False)] = None
    service_tier: Annotated[Any, Neutral("all requests are served alike", "auto", "default")] = None

    seed: int | None = Field(None, description=f"{_UNUSED}: decoding is deterministic")
    parallel_tool_calls: bool | None = Field(None, description=f"{_UNUSED}: {_NO_TOOLS}")
    metadata: dict[str, str] | None = Field(None, description=_UNUSED)
    prompt_cache_key: str | None = Field(None, description=_UNUSED)
    prompt_cache_retention: str | None = Field(None, description=_UNUSED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=_UNUSED)
    safety_identifier: str | None = Field(None, description=_UNUSED)
    user: str | None = Field(None, description=_UNUSED)

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer: what the client would take at most, within the server's bound."""
        asked = self.max_completion_tokens or self.max_tokens
        return None if asked is None else min(asked, MAX_NEW_TOKENS)


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
        refuse_others(chat)
        await check_model(backend, chat.model)
        question, image = _question_and_image(chat.messages)
        fields = schemas.TaskFields(text=question, max_new_tokens=chat.max_new_tokens)
        answers, extra = await answer(backend, settings, image, [("chat", fields)])
        return _completion(answers[0].to_dict(), extra)

    return router


async def check_model(backend: Backend, name: str | None) -> None:
    """Raises `UserError` if a request names another model than the loaded one."""
    info = await backend.info()
    if name is not None and name not in (info["preset"], f"{info['preset']}@{info['version']}"):
        raise UserError(f"unknown model '{name}'; models: {info['preset']}", "unknown_model")


def _question_and_image(messages: list[ChatMessage]) -> tuple[str, bytes]:
    """The text and the image of the single user message; raises `UserError` for any other conversation."""
    roles = [message.role for message in messages]
    if roles != ["user"]:
        raise UserError(
            f"the model takes exactly one user message, no system message or history; got roles {', '.join(roles)}",
            "unsupported_conversation",
        )
    refuse_others(messages[0], "messages.0.")
    parts = messages[0].content
    if parts is None:
        raise UserError("'messages.0.content' is required; give a text and one image", "missing_content")
    question = " ".join(part.text for part in parts if part.text)
    images = [(i, part.image_url) for i, part in enumerate(parts) if part.image_url]
    if len(images) != 1:
        raise UserError(f"the message needs exactly one part of type 'image_url', got {len(images)}", "missing_image")
    place, image = images[0]
    return question, image_bytes(image.url, f"messages.0.content.{place}.image_url.url")


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
