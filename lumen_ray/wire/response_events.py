"""A response in the format of `/v1/responses`, whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from lumen_ray.answer import Answer, TokenUsage
from lumen_ray.wire.completions import Reply, log_probs, without_model
from lumen_ray.wire.responses import AskedResponse
from lumen_ray.wire.tools import ToolCall, definition


class ResponseEvents:
    """The response to a request. `model`: preset@version, until the answer names the one that has given it."""

    ending = b""

    def __init__(self, asked: AskedResponse, model: str):
        self._asked, self._model = asked, model
        self._id, self._message_id = _identity("resp"), _identity("msg")
        self._created = int(time.time())
        self._number = 0
        self._sent = ""
        self._is_open = False  # whether the message has begun

    def response(self, answer: Answer, extra: dict[str, Any]) -> dict[str, Any]:
        """The whole response, whose extension field `lumen` has the whole answer and `extra`."""
        self._model = extra["model"]
        reply = self._reply(answer)
        return self._whole(reply, answer, self._output(reply, answer), extra)

    def begin(self) -> Iterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._head("in_progress"))

    def text(self, new: str) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            self._is_open = True
            message = {**self._message([]), "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=0, item=message)
            yield self._event("response.content_part.added", **self._place(), part=_text_part(""))
        self._sent += new
        yield self._event("response.output_text.delta", **self._place(), delta=new, logprobs=[])

    def end(self, answer: Answer, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is left of the text, its end, the calls of tools, and the whole response."""
        self._model = extra["model"]
        reply = self._reply(answer)
        output = self._output(reply, answer)
        if output[0]["type"] == "message":
            rest = reply.unsent(self._sent)
            if rest or not self._is_open:
                yield from self.text(rest)
            part = output[0]["content"][0]
            yield self._event("response.output_text.done", **self._place(), text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **self._place(), part=part)
            yield self._event("response.output_item.done", output_index=0, item=output[0])
        for index, item in enumerate(output):
            if item["type"] == "function_call":
                yield from self._call_events(index, item)
        whole = self._whole(reply, answer, output, extra)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event `error`. OpenAI's client raises the `error` in it."""
        body = error["error"]
        return self._event("error", code=body["code"], message=body["message"], param=body["param"], error=body)

    def _reply(self, answer: Answer) -> Reply:
        return Reply.of(self._asked.chat, answer, self._asked.tools)

    def _output(self, reply: Reply, answer: Answer) -> list[dict[str, Any]]:
        """The text, unless there are only calls, and the calls."""
        calls = [_call_item(call) for call in reply.calls]
        if not reply.text and calls and not self._is_open:
            return calls
        part = _text_part(reply.text)
        if self._asked.chat.logprobs:
            part["logprobs"] = log_probs(answer)
        return [self._message([part], reply.finish_reason == "length"), *calls]

    def _message(self, content: list[dict[str, Any]], is_cut: bool = False) -> dict[str, Any]:
        status = "incomplete" if is_cut else "completed"
        return {
            "type": "message",
            "id": self._message_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _call_events(self, index: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"output_index": index, "item_id": item["id"]}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        arguments = {"name": item["name"], "arguments": item["arguments"]}
        yield self._event("response.function_call_arguments.done", **place, **arguments)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _whole(
        self, reply: Reply, answer: Answer, output: list[dict[str, Any]], extra: dict[str, Any]
    ) -> dict[str, Any]:
        is_cut = reply.finish_reason == "length"
        return {
            **self._head("incomplete" if is_cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": output,
            "usage": _usage(answer.usage),
            "lumen": reply.extension | without_model(extra),
        }

    def _tool_choice(self) -> Any:
        """The value of the request, without what means nothing in it."""
        choice, tools = self._asked.body.tool_choice, self._asked.tools
        if not isinstance(choice, dict):
            return choice or "auto"
        names = [{"type": "function", "name": name} for name in tools.names]
        mode = "required" if tools.routing.is_required else "auto"
        return names[0] if choice["type"] == "function" else {"type": "allowed_tools", "mode": mode, "tools": names}

    def _head(self, status: str) -> dict[str, Any]:
        """The response without an answer, with the request's fields."""
        body = self._asked.body
        form = body.text and body.text.format
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature or 0,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": self._tool_choice(),
            "tools": [_flat(tool.name) for tool in body.tools or ()],
            "top_p": 1 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _flat(tool: str) -> dict[str, Any]:
    return {"type": "function", **definition(tool)}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": _identity("fc"),
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _usage(usage: TokenUsage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _identity(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
