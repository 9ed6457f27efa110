"""The messages of `/v1/chat/completions`: an optional system message, then user and assistant in turn, with images in
those of the user.

Messages that the model cannot read are refused in one sentence that names the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.wire.images import image_bytes
from lumen_ray.wire.neutral import Neutral, refuse_others

UNUSED = "accepted and without effect"
NO_TOOLS = "the model calls no tools"


class ImageUrl(Settings):
    url: str = Field(description="a data URL or base64; remote URLs are refused")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description=f"{UNUSED}: images have one input size"
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
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=UNUSED)

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
    """A message. Roles and keys of tools are known, so that the error is about them."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        list[Part] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
    ] = Field(None, description="the text, in parts, and in user messages images")
    name: str | None = Field(None, description=UNUSED)
    refusal: Annotated[Any, Neutral("a message holds no refusal", "")] = None
    audio: Annotated[Any, Neutral("a message holds text and an image")] = None
    annotations: Annotated[Any, Neutral("a message holds no annotations", [])] = None
    tool_calls: Annotated[Any, Neutral(NO_TOOLS, [])] = None
    tool_call_id: Annotated[Any, Neutral(NO_TOOLS, "")] = None
    function_call: Annotated[Any, Neutral(NO_TOOLS)] = None


@dataclass(frozen=True)
class Conversation:
    """`question`: the last user message; `history`: the earlier ones with their answers; `system`: the system text;
    `images`: the encoded images, `image_turns` the number of the user message (from 0) that each is in, `places` where
    each is in the request."""

    question: str
    history: list[tuple[str, str]]
    system: str | None
    images: list[bytes]
    image_turns: list[int]
    places: list[str]


def read_conversation(
    messages: Sequence[ChatMessage], max_images: int, read_image: Callable[[str, str], bytes] = image_bytes
) -> Conversation:
    """The conversation of at least one message; raises `UserError` for one that the model cannot read, or with more
    than `max_images` images. `read_image`: (URL, its place in the request) -> the encoded image."""
    has_system = _is_system(messages[0])
    _check_order(messages, int(has_system))
    for n, message in enumerate(messages):
        refuse_others(message, f"messages.{n}.")
    texts = [_text(n, message) for n, message in enumerate(messages)]
    found = _images(messages, max_images)
    images = [read_image(url, f"{place}.url") for _, place, url in found]
    system = texts.pop(0) if has_system else None
    # stripped, as the question is, so that it reads the same when it comes back as history
    turns = list(zip((text.strip() for text in texts[:-1:2]), texts[1::2], strict=True))
    image_turns = [(n - has_system) // 2 for n, _, _ in found]
    return Conversation(texts[-1], turns, system, images, image_turns, [place for _, place, _ in found])


def _is_system(message: ChatMessage) -> bool:
    return message.role in ("system", "developer")


def _check_order(messages: Sequence[ChatMessage], first: int) -> None:
    """Raises `UserError` unless users and assistants take turns from message `first` on, and a user is the last."""
    for n, message in enumerate(messages):
        if message.role in ("tool", "function"):
            raise _unsupported(n, f"is of role '{message.role}', but {NO_TOOLS}; leave it out")
        if _is_system(message) and n:
            raise _unsupported(n, f"is of role '{message.role}'; put one such message first, and no other")
    roles = [message.role for message in messages]
    if roles[first:] and roles[first] != "user":
        raise _unsupported(first, f"is of role '{roles[first]}'; begin with a user message")
    for n in range(first + 1, len(roles)):
        if roles[n] == roles[n - 1]:
            between = "assistant's answer" if roles[n] == "user" else "user's question"
            raise _unsupported(
                n, f"follows another {roles[n]} message; join the two, or put the {between} between them"
            )
    if roles[-1] != "user":
        raise _unsupported(len(roles) - 1, f"is the last and of role '{roles[-1]}'; end with a user message")


def _unsupported(n: int, problem: str) -> UserError:
    return UserError(f"'messages.{n}' {problem}", "unsupported_conversation", f"messages.{n}")


def _text(n: int, message: ChatMessage) -> str:
    """The texts of a message's parts, joined."""
    if not message.content:
        raise UserError(f"'messages.{n}.content' is empty; give a text", "missing_content", f"messages.{n}.content")
    text = " ".join(part.text for part in message.content if part.text)
    if not text.strip():
        raise UserError(f"'messages.{n}.content' has no text; give one", "empty_text", f"messages.{n}.content")
    return text


def _images(messages: Sequence[ChatMessage], most: int) -> list[tuple[int, str, str]]:
    """The images of the conversation in order: (number of the message, place in the request, URL)."""
    found: list[tuple[int, str, str]] = []
    for n, message in enumerate(messages):
        for i, part in enumerate(message.content or ()):
            if part.image_url is None:
                continue
            place = f"messages.{n}.content.{i}.image_url"
            if message.role != "user":
                raise UserError(
                    f"'{place}' is an image of the {message.role}; give it in a user message", "unexpected_image", place
                )
            found.append((n, place, part.image_url.url))
    if len(found) > most:
        raise UserError(
            f"the conversation has {len(found)} images; give at most {most} in all its messages",
            "too_many_images",
            "messages",
        )
    return found
