"""A chat completion in OpenAI's format.

When the LLM routes the prompt to a decoder, the instances are in the extension field `lumen`, and `content` is the text
around them: `lumen.parts` has both in the order of writing. A model that has not learned to go on behind a routing
token ends its answer there. Decoders that the request lists as tools are in `tool_calls`, too.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lumen_ray.answer import Answer, TokenUsage
from lumen_ray.wire.chat import ChatRequest
from lumen_ray.wire.errors import Unavailable
from lumen_ray.wire.results import result_of
from lumen_ray.wire.tools import ToolCall, ToolUse, calls_of, parts_of

#: the least log probability, which JSON has a number for, as in OpenAI's API
_LEAST_LOG_PROB = -9999.0


@dataclass(frozen=True)
class Reply:
    """An answer as OpenAI's formats have it: its text, the calls of tools, why it ended ("stop", "length" or
    "tool_calls"), and the extension field `lumen`."""

    text: str
    calls: list[ToolCall]
    finish_reason: str
    extension: dict[str, Any]

    @classmethod
    def of(cls, chat: ChatRequest, answer: Answer, tools: ToolUse) -> Reply:
        extension = answer.to_dict()
        if chat.num_images > 1:  # decoders look at the last one
            extension["image"] = chat.num_images - 1
        text = answer.text or ""
        if tools.result is not None:
            text = json.dumps(result_of(tools.result, answer), ensure_ascii=False)
        calls = [] if answer.route is None else calls_of(answer, tools.names, chat.question)
        if calls:
            extension["parts"] = parts_of(answer, calls)
        ended = "tool_calls" if calls else "length" if answer.is_cut else "stop"
        return cls(text, calls, ended, extension)

    def unsent(self, sent: str) -> str:
        """The text behind what a client has of it, which may end in more space. Raises `Unavailable` if that is of
        another answer."""
        if not self.text.startswith(sent.rstrip()):
            raise Unavailable("the answer was written anew while it was sent; ask again")
        return self.text[len(sent) :]


def completion(chat: ChatRequest, answers: Sequence[Answer], model: str) -> dict[str, Any]:
    """The response to a request. The extension field `lumen` has the whole answer; of several each choice has its own,
    and the response that of the first. `answers`: one for each choice, or one for all; `model`: preset@version."""
    tools = chat.tool_use
    replies = [Reply.of(chat, answer, tools) for answer in answers]
    choices = []
    for index in range(chat.choices):
        reply, answer = replies[index % len(replies)], answers[index % len(answers)]
        choice = {
            "index": index,
            "message": _message(reply),
            "logprobs": {"content": log_probs(answer), "refusal": None} if chat.logprobs else None,
            "finish_reason": reply.finish_reason,
        }
        choices.append(choice if chat.choices == 1 else {**choice, "lumen": reply.extension})
    return {
        **_head("chat.completion", model),
        "choices": choices,
        "usage": _usage(total_usage(answers)),
        "lumen": replies[0].extension,
    }


def _message(reply: Reply) -> dict[str, Any]:
    if not reply.calls:
        return {"role": "assistant", "content": reply.text}
    calls = [_call(call) for call in reply.calls]
    return {"role": "assistant", "content": reply.text or None, "tool_calls": calls}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class Chunks:
    """The events of a streamed response, as objects `chat.completion.chunk`. `model`: preset@version, until the last
    events name the one that has answered."""

    ending = b"data: [DONE]\n\n"

    def __init__(self, chat: ChatRequest, model: str):
        self._chat = chat
        self._head = _head("chat.completion.chunk", model)
        self._sent = ""
        self._with_usage = bool(chat.stream_options and chat.stream_options.include_usage)

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first event."""
        yield self._chunk({"role": "assistant", "content": ""})

    def text(self, new: str) -> Iterator[dict[str, Any]]:
        """The event of new text."""
        self._sent += new
        yield self._chunk({"content": new})

    def end(self, answer: Answer, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events behind the last text: what is left of it, the calls of tools, the end, whose extension field
        `lumen` has the whole answer and `extra`, and the numbers of tokens if they were asked for."""
        reply = Reply.of(self._chat, answer, self._chat.tool_use)
        self._head["model"] = extra["model"]
        extra = without_model(extra)
        if rest := reply.unsent(self._sent):
            yield from self.text(rest)
        for index, call in enumerate(reply.calls):
            yield self._chunk({"tool_calls": [{"index": index, **_call(call)}]})
        yield {**self._chunk({}, reply.finish_reason), "lumen": reply.extension | extra}
        if self._with_usage:
            yield {**self._head, "choices": [], "usage": _usage(answer.usage)}

    def failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of an answer that fails, from the body of the error."""
        return error

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})}


def without_model(extra: dict[str, Any]) -> dict[str, Any]:
    """The response's fields that are in the extension field `lumen`."""
    return {name: value for name, value in extra.items() if name != "model"}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def total_usage(answers: Sequence[Answer]) -> TokenUsage | None:
    """The tokens of several answers to one prompt, which counts once; None if they are not known."""
    used = [answer.usage for answer in answers if answer.usage is not None]
    return TokenUsage(used[0].prompt, sum(usage.completion for usage in used)) if used else None


def _usage(usage: TokenUsage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    total = usage.prompt + usage.completion
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": total}


def log_probs(answer: Answer) -> list[dict[str, Any]]:
    """An entry per token, whose texts joined are the answer: without outer blanks and what a stop text cut off."""
    text, tokens = answer.text or "", answer.tokens or []
    top_tokens = answer.top_tokens or [[]] * len(tokens)
    written = "".join(tokens)
    end = len(written.lstrip()) - len(written)  # of the last token, in `text`; below 0 in the blanks before it
    entries = []
    for token, log_prob, top in zip(tokens, answer.log_probs or (), top_tokens, strict=True):
        start, end = end, end + len(token)
        if start >= len(text):
            break
        piece = text[max(start, 0) : max(end, 0)]
        entries.append({**_entry(piece, log_prob), "top_logprobs": [_entry(*item) for item in top]})
    return entries


def _entry(token: str, log_prob: float) -> dict[str, Any]:
    return {"token": token, "logprob": max(_LEAST_LOG_PROB, log_prob), "bytes": list(token.encode())}
