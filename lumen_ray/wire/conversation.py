"""The messages of `/v1/chat/completions`: an optional system message, then user and assistant in turn, with images in
those of the user, and behind an assistant's calls of tools their results.

Messages that the model cannot read are refused in one sentence that names the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.wire.images import IMAGE_URL, GivenImage, given_image
from lumen_ray.wire.neutral import Neutral, refuse_others
from lumen_ray.wire.tools import UNUSED, as_read


class ImageUrl(Settings):
    url: str = Field(description=IMAGE_URL)
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


class CalledFunction(Settings):
    name: str
    arguments: str = Field(description=f"{UNUSED}: the model reads the result")


class GivenCall(Settings):
    """A call of an earlier answer."""

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description=UNUSED)


class ChatMessage(Settings):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        list[Part] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
    ] = Field(None, description="the text, in parts, and in user messages images")
    name: str | None = Field(None, description=UNUSED)
    refusal: Annotated[Any, Neutral("a message holds no refusal", "")] = None
    audio: Annotated[Any, Neutral("a message holds text and an image")] = None
    annotations: Annotated[Any, Neutral("a message holds no annotations", [])] = None
    tool_calls: list[GivenCall] | None = Field(None, description="of the assistant: the calls of an earlier answer")
    tool_call_id: str | None = Field(None, description="of a tool message: the call whose result it is")
    function_call: Annotated[Any, Neutral("calls are in tool_calls")] = None

    @property
    def is_system(self) -> bool:
        return self.role in ("system", "developer")


@dataclass(frozen=True)
class Conversation:
    """`question`: the last user message; `history`: the earlier ones with their answers; `system`: the system text;
    `images`: the images, `image_turns` the number of the user message (from 0) that each is in, `places` where
    each is in the request; `result`: of a conversation that ends with results of tools, their texts."""

    question: str
    history: list[tuple[str, str]]
    system: str | None
    images: list[GivenImage]
    image_turns: list[int]
    places: list[str]
    result: str | None = None


def read_conversation(
    messages: Sequence[ChatMessage],
    max_images: int,
    read_image: Callable[[str, str], GivenImage] = given_image,
    places: Sequence[str] | None = None,
) -> Conversation:
    """The conversation of at least one message; raises `UserError` for one that the model cannot read, or with more
    than `max_images` images. `read_image`: (URL, its place in the request) -> the image; `places`: of the
    messages in the request."""
    placed = list(zip(places or [f"messages.{n}" for n in range(len(messages))], messages, strict=True))
    _check_order(placed)
    for place, message in placed:
        refuse_others(message, f"{place}.")
        _check_keys(place, message)
    texts = [_text(place, message) for place, message in placed]
    found = _images(placed, max_images)
    images = [read_image(url, f"{place}.url") for _, place, url in found]
    system = texts[0] if messages[0].is_system else None
    questions = [n for n, message in enumerate(messages) if message.role == "user"]
    # stripped, as the last question is, so that it reads the same when it comes back as history
    turns = [
        (texts[start].strip(), _joined(texts[start + 1 : end]))
        for start, end in zip(questions[:-1], questions[1:], strict=True)
    ]
    image_turns = [questions.index(n) for n, _, _ in found]
    results = [n for n in range(questions[-1], len(messages)) if messages[n].role == "tool"]
    return Conversation(
        texts[questions[-1]],
        turns,
        system,
        images,
        image_turns,
        [place for _, place, _ in found],
        ", ".join(texts[n] for n in results) if messages[-1].role == "tool" else None,
    )


def _joined(texts: Sequence[str]) -> str:
    """The texts of a turn; an answer that calls tools may have none itself."""
    return " ".join(text for text in texts if text)


def _check_order(placed: Sequence[tuple[str, ChatMessage]]) -> None:
    """Raises `UserError` unless users and assistants take turns behind a system message, if any, with the results of
    its calls behind an assistant message, and the last is of a user or a result."""
    before, waiting = "", set[str]()  # the role before, and the calls that have no result yet
    for place, message in placed:
        role = message.role
        if waiting and role != "tool":
            raise _unsupported(place, f"stands before the result of the call '{min(waiting)}'; give that first")
        if role == "tool":
            if message.tool_call_id not in waiting:
                raise _unsupported(place, f"is a result of {_call_in_words(message)}; put it behind that call, once")
            waiting.remove(message.tool_call_id or "")
        elif message.is_system and place != placed[0][0]:
            raise _unsupported(place, f"is of role '{role}'; put one such message first, and no other")
        elif role == "function":
            raise _unsupported(place, "is of role 'function'; give the result of a call in a message of role 'tool'")
        elif not before and role == "assistant":
            raise _unsupported(place, f"is of role '{role}'; begin with a user message")
        elif role == before:
            between = "assistant's answer" if role == "user" else "user's question"
            raise _unsupported(
                place, f"follows another {role} message; join the two, or put the {between} between them"
            )
        if role == "assistant":
            waiting = {call.id for call in message.tool_calls or ()}
        before = "" if message.is_system else role
    if waiting:
        raise _unsupported(placed[-1][0], f"is the last; give the result of its call '{min(waiting)}' behind it")
    if before not in ("user", "tool"):
        raise _unsupported(placed[-1][0], f"is the last and of role '{placed[-1][1].role}'; end with a user message")


def _check_keys(place: str, message: ChatMessage) -> None:
    """Raises `UserError` for keys of calls and results in messages of another role."""
    for key, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, key) and message.role != role:
            raise UserError(
                f"'{place}.{key}' belongs into a message of role '{role}', not '{message.role}'; leave it out",
                "unsupported_parameter",
                f"{place}.{key}",
            )


def _call_in_words(message: ChatMessage) -> str:
    return f"the call '{message.tool_call_id}'" if message.tool_call_id else "no call ('tool_call_id' is missing)"


def _unsupported(place: str, problem: str) -> UserError:
    return UserError(f"'{place}' {problem}", "unsupported_conversation", place)


def _text(place: str, message: ChatMessage) -> str:
    """The texts of a message's parts, joined; of a result what the model reads of it."""
    text = " ".join(part.text for part in message.content or () if part.text)
    if message.role == "tool":
        text = as_read(text)
    if text.strip() or message.tool_calls:
        return text if text.strip() else ""
    if not message.content:
        raise UserError(f"'{place}.content' is empty; give a text", "missing_content", f"{place}.content")
    raise UserError(f"'{place}.content' has no text; give one", "empty_text", f"{place}.content")


def _images(placed: Sequence[tuple[str, ChatMessage]], most: int) -> list[tuple[int, str, str]]:
    """The images of the conversation in order: (number of the message, place in the request, URL)."""
    found: list[tuple[int, str, str]] = []
    for n, (where, message) in enumerate(placed):
        for i, part in enumerate(message.content or ()):
            if part.image_url is None:
                continue
            place = f"{where}.content.{i}.image_url"
            if message.role != "user":
                raise UserError(
                    f"'{place}' is an image of the {message.role}; give it in a user message", "unexpected_image", place
                )
            found.append((n, place, part.image_url.url))
    if len(found) > most:
        raise UserError(
            f"the conversation has {len(found)} images; give at most {most} in all its messages",
            "too_many_images",
            placed[-1][0].partition(".")[0],
        )
    return found
