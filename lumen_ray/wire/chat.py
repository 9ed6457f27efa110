"""A chat completion in OpenAI's format, as far as the model supports it: conversations with and without images.

Parameters that cannot be honoured are taken at their neutral value and refused at any other. When the LLM routes the
prompt to a decoder, the instances are in the extension field `lumen`, and `content` is the text around them:
`lumen.parts` has both in the order of writing. A model that has not learned to go on behind a routing token ends its
answer there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lumen_ray.answer import Answer, TokenUsage
from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.wire import schemas
from lumen_ray.wire.conversation import NO_TOOLS, UNUSED, ChatMessage, Conversation, read_conversation
from lumen_ray.wire.images import image_bytes
from lumen_ray.wire.neutral import Neutral, refuse_others
from lumen_ray.wire.requests import Asked
from lumen_ray.wire.settings import MAX_NEW_TOKENS, Limits

#: where a server takes these requests; the one URL of those in batch files
CHAT_URL = "/v1/chat/completions"
_ONE_ANSWER = "each request has one answer"
_NO_PENALTY = "tokens are not penalised by how often they occur"
_TEXT_ONLY = "answers are plain text"
_GREEDY = "decoding is greedy (the server's setting 'openai_sampling' is off)"
#: parameters of sampling -> their values where decoding is greedy
_SAMPLING = {
    "temperature": Neutral(_GREEDY, 0),
    "top_p": Neutral(_GREEDY, 1),
    "top_k": Neutral(_GREEDY, 0, -1),
    "repetition_penalty": Neutral(_GREEDY, 1),
    "stop": Neutral(_GREEDY, []),
}
_NEEDS_SAMPLING = "taken if the server's setting openai_sampling is on"
#: the least log probability, which JSON has a number for, as in OpenAI's API
_LEAST_LOG_PROB = -9999.0


def _as_stops(value: Any) -> Any:
    """A plain text stands for a list of one."""
    if isinstance(value, str):
        return [value]
    if value is not None and not isinstance(value, list):
        raise UserError("'stop' is a text or a list of texts")
    return value


class StreamOptions(Settings):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="whether a last event has the numbers of tokens")
    include_obfuscation: Annotated[bool | None, Neutral("events are not padded", False)] = None


class ChatRequest(Settings):
    """A conversation that ends with a question."""

    model: str | None = Field(None, description="the preset from GET /v1/models; null for the model that is loaded")
    messages: list[ChatMessage] = Field(
        min_length=1,
        description="system or developer first, if any; user and assistant in turn; user last; images in user messages",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description=f"longest answer, in tokens of the model; more than {MAX_NEW_TOKENS} is {MAX_NEW_TOKENS}",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")

    temperature: schemas.Temperature | None = Field(
        None,
        description=f"0 or null takes the most probable tokens; above 0, {_NEEDS_SAMPLING}, they are drawn",
    )
    top_p: schemas.Fraction | None = Field(
        None,
        description=f"draw from the most probable tokens with this probability in sum; below 1, {_NEEDS_SAMPLING}",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        le=2**31,
        description=f"not in OpenAI's API: draw from so many tokens at most; above 0, {_NEEDS_SAMPLING}; -1, 0: all",
    )
    repetition_penalty: schemas.Penalty | None = Field(
        None,
        description="not in OpenAI's API: above 1, tokens of prompt and answer become less probable; other than 1, "
        f"{_NEEDS_SAMPLING}",
    )
    stop: Annotated[list[str] | None, BeforeValidator(_as_stops, json_schema_input_type=str | list[str] | None)] = (
        Field(None, description=f"a text that ends the answer, or up to 16 of them; {_NEEDS_SAMPLING}")
    )
    seed: int | None = Field(
        None, description="of the tokens drawn: the same request with the same seed gets the same answer; null: any"
    )
    logprobs: bool | None = Field(None, description="whether the answer has the log probabilities of its tokens")
    top_logprobs: Annotated[int | None, Neutral("only the chosen tokens have log probabilities", 0)] = None
    n: Annotated[int | None, Neutral(_ONE_ANSWER, 1)] = None
    frequency_penalty: Annotated[float | None, Neutral(_NO_PENALTY, 0)] = None
    presence_penalty: Annotated[float | None, Neutral(_NO_PENALTY, 0)] = None
    logit_bias: Annotated[Any, Neutral("the probabilities of tokens are not changed", {})] = None
    stream: bool | None = Field(
        None, description="whether the answer comes in pieces, as server-sent events, while it is written"
    )
    stream_options: StreamOptions | None = Field(None, description="of a streamed answer")
    response_format: Annotated[Any, Neutral(_TEXT_ONLY, {"type": "text"})] = None
    modalities: Annotated[Any, Neutral(_TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, Neutral(_TEXT_ONLY)] = None
    tools: Annotated[Any, Neutral(NO_TOOLS, [])] = None
    functions: Annotated[Any, Neutral(NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, Neutral(NO_TOOLS, "none", "auto")] = None
    function_call: Annotated[Any, Neutral(NO_TOOLS, "none", "auto")] = None
    prediction: Annotated[Any, Neutral("a predicted answer is not used")] = None
    reasoning_effort: Annotated[Any, Neutral("the model answers without reasoning", "none")] = None
    verbosity: Annotated[Any, Neutral("the length of answers cannot be steered", "medium")] = None
    web_search_options: Annotated[Any, Neutral("the model does not search the web")] = None
    moderation: Annotated[Any, Neutral("nothing is moderated")] = None
    store: Annotated[bool | None, Neutral("answers are not stored", False)] = None
    service_tier: Annotated[Any, Neutral("all requests are served alike", "auto", "default")] = None

    parallel_tool_calls: bool | None = Field(None, description=f"{UNUSED}: {NO_TOOLS}")
    metadata: dict[str, str] | None = Field(None, description=UNUSED)
    prompt_cache_key: str | None = Field(None, description=UNUSED)
    prompt_cache_retention: str | None = Field(None, description=UNUSED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=UNUSED)
    safety_identifier: str | None = Field(None, description=UNUSED)
    user: str | None = Field(None, description=UNUSED)

    @property
    def num_images(self) -> int:
        return sum(part.image_url is not None for message in self.messages for part in message.content or ())

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer: what the client would take at most, within the server's bound."""
        asked = self.max_completion_tokens or self.max_tokens
        return None if asked is None else min(asked, MAX_NEW_TOKENS)


def parse_chat(data: dict[str, Any], takes_sampling: bool, takes_stream: bool = False) -> ChatRequest:
    """The request in a JSON object. Raises `UserError` for what is none and for parameters that cannot be honoured:
    those of sampling and streaming too, unless `takes_sampling` and `takes_stream`."""
    chat = schemas.parse(ChatRequest, data)
    refuse_others(chat)
    if chat.stream_options is not None:
        refuse_others(chat.stream_options)
        if not chat.stream:
            raise UserError(
                "'stream_options' needs 'stream': true; set it, or leave the options out",
                "unsupported_parameter",
                "stream_options",
            )
    if chat.stream and not takes_stream:
        raise UserError(
            "answers are not streamed here; leave 'stream' out or set it to false", "streaming_unsupported", "stream"
        )
    if chat.stream and chat.logprobs:
        raise UserError(
            "streamed answers have no log probabilities; leave 'logprobs' or 'stream' out",
            "unsupported_parameter",
            "logprobs",
        )
    if not takes_sampling:
        _refuse_sampling(chat)
    return chat


def read_chat(chat: ChatRequest, limits: Limits, read_image: Callable[[str, str], bytes] = image_bytes) -> Asked:
    """The conversation as a task about its images. Raises `UserError` for one that the model cannot read.

    `read_image`: (URL, its place in the request) -> the encoded image.
    """
    conversation = read_conversation(chat.messages, limits.max_images, read_image)
    fields = _task_fields(chat, conversation)
    turns = tuple(conversation.image_turns[1:])  # the first image stands before all questions
    places = conversation.places if len(conversation.images) > 1 else ()  # of a single image the error says enough
    return Asked(conversation.images, [("chat", fields)], turns, places)


def check_model(name: str | None, preset: str, version: str) -> None:
    """Raises `UserError` if a request names another model than the loaded one."""
    if name is not None and name not in (preset, f"{preset}@{version}"):
        raise UserError(f"unknown model '{name}'; models: {preset}", "unknown_model", "model")


def _refuse_sampling(chat: ChatRequest) -> None:
    """Raises `UserError` for the first parameter that greedy decoding cannot honour."""
    for name, rule in _SAMPLING.items():
        if not rule.takes(getattr(chat, name)):
            raise rule.refusal(name)


def _task_fields(chat: ChatRequest, conversation: Conversation) -> schemas.TaskFields:
    """The request as one to `/v1/chat`."""
    return schemas.TaskFields(
        text=conversation.question,
        history=conversation.history,
        system=conversation.system,
        max_new_tokens=chat.max_new_tokens,
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=None if chat.top_k is None else max(chat.top_k, 0),  # -1 for all tokens is vLLM's habit
        repetition_penalty=chat.repetition_penalty,
        stop=chat.stop,
        seed=None if chat.seed is None else chat.seed % 2**63,  # OpenAI's may be negative
    )


def completion(chat: ChatRequest, answer: Answer, model: str) -> dict[str, Any]:
    """The response to a request, whose extension field `lumen` has the whole answer. `model`: preset@version."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text or ""},
        "logprobs": {"content": _log_probs(answer), "refusal": None} if chat.logprobs else None,
        "finish_reason": _finish_reason(answer),
    }
    return {
        **_head("chat.completion", model),
        "choices": [choice],
        "usage": _usage(answer.usage),
        "lumen": _extension(chat, answer),
    }


class Chunks:
    """The events of a streamed response, as objects `chat.completion.chunk`. `model`: preset@version."""

    def __init__(self, chat: ChatRequest, model: str):
        self._chat = chat
        self._head = _head("chat.completion.chunk", model)
        self._sent = ""
        self._with_usage = bool(chat.stream_options and chat.stream_options.include_usage)

    def begin(self) -> dict[str, Any]:
        """The first event."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, new: str) -> dict[str, Any]:
        """The event of new text."""
        self._sent += new
        return self._chunk({"content": new})

    def end(self, answer: Answer, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events behind the last text: what is left of it, the end, whose extension field `lumen` has the whole
        answer and `extra`, and the numbers of tokens if they were asked for."""
        text = answer.text or ""
        if text.startswith(self._sent) and (rest := text[len(self._sent) :]):
            yield self.text(rest)
        extension = _extension(self._chat, answer) | extra
        yield {**self._chunk({}, _finish_reason(answer)), "lumen": extension}
        if self._with_usage:
            yield {**self._head, "choices": [], "usage": _usage(answer.usage)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.is_cut else "stop"


def _extension(chat: ChatRequest, answer: Answer) -> dict[str, Any]:
    extension = answer.to_dict()
    if chat.num_images > 1:  # decoders look at the last one
        extension["image"] = chat.num_images - 1
    return extension


def _usage(usage: TokenUsage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    total = usage.prompt + usage.completion
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": total}


def _log_probs(answer: Answer) -> list[dict[str, Any]]:
    """An entry per token, whose texts joined are the answer: without outer blanks and what a stop text cut off."""
    text, tokens = answer.text or "", answer.tokens or []
    written = "".join(tokens)
    end = len(written.lstrip()) - len(written)  # of the last token, in `text`; below 0 in the blanks before it
    entries = []
    for token, log_prob in zip(tokens, answer.log_probs or (), strict=True):
        start, end = end, end + len(token)
        if start >= len(text):
            break
        piece = text[max(start, 0) : max(end, 0)]
        entries.append(
            {
                "token": piece,
                "logprob": max(_LEAST_LOG_PROB, log_prob),
                "bytes": list(piece.encode()),
                "top_logprobs": [],
            }
        )
    return entries
