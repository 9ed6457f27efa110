"""`/v1/responses` in OpenAI's format: another form of the same request as `/v1/chat/completions`.

A request is read as the one for a chat completion (`wire.chat`), with the places that its errors name. Nothing is
stored, so that a conversation is sent again whole. The answer is in `response_events`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.wire import schemas
from lumen_ray.wire.chat import NEEDS_SAMPLING, ChatRequest, TopLogProbs, check_chat
from lumen_ray.wire.conversation import ChatMessage
from lumen_ray.wire.images import IMAGE_URL
from lumen_ray.wire.neutral import Neutral, refuse_others
from lumen_ray.wire.settings import MAX_NEW_TOKENS
from lumen_ray.wire.tools import UNUSED, Function, ToolUse, read_tools

_NOT_STORED = "nothing is stored; send the whole conversation in 'input'"
_TEXT_ALONE = "answers are text and calls of tools"
_LOG_PROBS = "message.output_text.logprobs"


class InputPart(Settings):
    """A text or an image of a message, or a text of an earlier answer."""

    type: Literal["input_text", "input_image", "output_text"]
    text: str | None = Field(None, description="of input_text and output_text")
    image_url: str | None = Field(None, description=f"of input_image: {IMAGE_URL}")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description=UNUSED)
    file_id: Annotated[Any, Neutral("files are not read; give 'image_url'")] = None
    annotations: Annotated[Any, Neutral("a text has no annotations", [])] = None
    logprobs: Any = Field(None, description=UNUSED)
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=UNUSED)


def _as_input_parts(content: Any) -> Any:
    """A plain text stands for a list of one part."""
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if content is not None and not isinstance(content, list):
        raise UserError("give a text, or a list of parts of type 'input_text' or 'input_image'")
    return content


_Parts = Annotated[
    list[InputPart] | None, BeforeValidator(_as_input_parts, json_schema_input_type=str | list[InputPart] | None)
]


class InputItem(Settings):
    """A message, the call of a tool in an earlier answer, or its result."""

    type: Literal["message", "function_call", "function_call_output"] | None = Field(None, description="null: message")
    role: Literal["user", "assistant", "system", "developer"] | None = Field(None, description="of a message")
    content: _Parts = Field(None, description="of a message: the text, in parts, and in user messages images")
    call_id: str | None = Field(None, description="of a call and of its result")
    name: str | None = Field(None, description="of a call: the tool")
    arguments: str | None = Field(None, description="of a call")
    output: _Parts = Field(None, description="of a result: a text, or a list of parts of type input_text")
    id: str | None = Field(None, description=UNUSED)
    status: str | None = Field(None, description=UNUSED)
    phase: str | None = Field(None, description=UNUSED)
    namespace: Annotated[Any, Neutral("tools have no namespaces")] = None
    caller: Annotated[Any, Neutral("tools are called by the model alone")] = None


def _as_items(value: Any) -> Any:
    """A plain text stands for a user message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if value is not None and not isinstance(value, list):
        raise UserError("give a text, or a list of messages, calls and results")
    return value


class ResponseTool(Function):
    """A tool by its name."""

    type: Literal["function"]


class TextFormat(Settings):
    """The form of the answer's text."""

    type: Literal["text", "json_schema"]
    name: str | None = Field(None, description="of json_schema: the tool whose result the text is to be")
    schema_: Any = Field(None, alias="schema", description="that of its result, as at GET /v1/tools")
    strict: bool | None = Field(None, description=f"{UNUSED}: the text always fits")
    description: str | None = Field(None, description=UNUSED)


class TextConfig(Settings):
    format: TextFormat | None = None
    verbosity: Annotated[Any, Neutral("the length of answers cannot be steered", "medium")] = None


class ResponseStreamOptions(Settings):
    include_obfuscation: Annotated[bool | None, Neutral("events are not padded", False)] = None


class ResponsesRequest(Settings):
    """A conversation that ends with a question."""

    model: str | None = Field(None, description="the preset from GET /v1/models; null for the model that is loaded")
    input: Annotated[
        list[InputItem], BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]), Field(min_length=1)
    ] = Field(description="the question, or the conversation: messages, calls of tools and their results")
    instructions: str | None = Field(None, description="the system text, in place of a system message")
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        description=f"longest answer, in tokens of the model; more than {MAX_NEW_TOKENS} is {MAX_NEW_TOKENS}",
    )
    temperature: schemas.Temperature | None = Field(
        None, description=f"0 or null takes the most probable tokens; above 0, {NEEDS_SAMPLING}, they are drawn"
    )
    top_p: schemas.Fraction | None = Field(
        None,
        description=f"draw from the most probable tokens with this probability in sum; below 1, {NEEDS_SAMPLING}",
    )
    stream: bool | None = Field(
        None, description="whether the answer comes in pieces, as server-sent events, while it is written"
    )
    stream_options: ResponseStreamOptions | None = Field(None, description="of a streamed answer")
    tools: list[ResponseTool] | None = Field(None, description="the decoders that may be called, see GET /v1/tools")
    tool_choice: Any = Field(
        None, description="as of /v1/chat/completions, with the name of a function beside its type"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: an answer has one call at most")
    text: TextConfig | None = Field(None, description="the form of the answer's text")
    include: Annotated[list[Any] | None, Neutral(f"only '{_LOG_PROBS}' is added", [], [_LOG_PROBS])] = None
    top_logprobs: TopLogProbs = None
    store: Annotated[bool | None, Neutral(_NOT_STORED, False)] = None
    previous_response_id: Annotated[Any, Neutral(_NOT_STORED)] = None
    conversation: Annotated[Any, Neutral(_NOT_STORED)] = None
    prompt: Annotated[Any, Neutral(_NOT_STORED)] = None
    background: Annotated[bool | None, Neutral("answers are given at once", False)] = None
    background_options: Annotated[Any, Neutral("answers are given at once", {})] = None
    reasoning: Annotated[
        Any, Neutral("the model answers without reasoning", {}, {"effort": None}, {"effort": "none"})
    ] = None
    truncation: Annotated[Any, Neutral("a conversation that is too long is refused", "disabled")] = None
    context_management: Annotated[Any, Neutral("a conversation that is too long is refused", [])] = None
    max_tool_calls: Annotated[Any, Neutral("an answer has the calls that it has")] = None
    moderation: Annotated[Any, Neutral("nothing is moderated")] = None
    access_programs: Annotated[Any, Neutral("there are no programs")] = None
    image: Annotated[Any, Neutral("images are not compressed", {}, {"context_compression": "disabled"})] = None
    service_tier: Annotated[Any, Neutral("all requests are served alike", "auto", "default")] = None
    metadata: dict[str, str] | None = Field(None, description="comes back with the answer")
    prompt_cache_key: str | None = Field(None, description=UNUSED)
    prompt_cache_retention: str | None = Field(None, description=UNUSED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=UNUSED)
    safety_identifier: str | None = Field(None, description=UNUSED)
    user: str | None = Field(None, description=UNUSED)


@dataclass(frozen=True)
class AskedResponse:
    """A request for a response: `body` as it came; as that for a chat completion, whose messages are at `places` of the
    body; and its tools."""

    body: ResponsesRequest
    chat: ChatRequest
    places: Sequence[str]
    tools: ToolUse


def parse_responses(data: dict[str, Any], takes_sampling: bool) -> AskedResponse:
    """The request in a JSON object. Raises `UserError` for what is none and for parameters that cannot be honoured:
    those of sampling too, unless `takes_sampling`."""
    body = schemas.parse(ResponsesRequest, data)
    refuse_others(body)
    if body.text is not None:
        refuse_others(body.text, "text.")
    if body.stream_options is not None:
        refuse_others(body.stream_options, "stream_options.")
    functions = [(f"tools.{n}", tool) for n, tool in enumerate(body.tools or ())]
    tools = read_tools(functions, body.tool_choice, body.parallel_tool_calls, _schema(body.text))
    messages, places = _messages(body)
    chat = ChatRequest(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        logprobs=bool(body.include),
        top_logprobs=body.top_logprobs,
    )
    check_chat(chat, takes_sampling)
    return AskedResponse(body, chat, places, tools)


def _schema(text: TextConfig | None) -> tuple[str, Any, str] | None:
    """As of `tools.read_tools`."""
    if text is None or text.format is None or text.format.type == "text":
        return None
    if text.format.name is None:
        raise UserError(
            "'text.format.name' is missing; give the name of a tool, see GET /v1/tools",
            "invalid_request",
            "text.format.name",
        )
    return text.format.name, text.format.schema_, "text.format"


def _messages(body: ResponsesRequest) -> tuple[list[ChatMessage], list[str]]:
    """The messages of a chat completion, and the place of each in the body. Calls that follow each other are of one
    answer, with the text before them."""
    placed: list[tuple[str, dict[str, Any]]] = []
    if body.instructions is not None:
        placed.append(("instructions", {"role": "system", "content": body.instructions}))
    for n, item in enumerate(body.input):
        place = f"input.{n}"
        refuse_others(item, f"{place}.")
        if item.type == "function_call":
            if not placed or placed[-1][1]["role"] != "assistant":
                placed.append((place, {"role": "assistant"}))
            placed[-1][1].setdefault("tool_calls", []).append(_call(place, item))
        elif item.type == "function_call_output":
            parts = _parts(f"{place}.output", item.output)
            placed.append((place, {"role": "tool", "content": parts, "tool_call_id": item.call_id}))
        else:
            if item.role is None:
                raise UserError(f"'{place}.role' is missing; give one", "invalid_request", f"{place}.role")
            placed.append((place, {"role": item.role, "content": _parts(f"{place}.content", item.content)}))
    return [schemas.parse(ChatMessage, message) for _, message in placed], [place for place, _ in placed]


def _call(place: str, item: InputItem) -> dict[str, Any]:
    """A call in the form of chat completions."""
    if not item.call_id or not item.name:
        raise UserError(f"'{place}' is a call; give its 'call_id' and 'name'", "invalid_request", place)
    return {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments or ""}}


def _parts(place: str, parts: Sequence[InputPart] | None) -> list[dict[str, Any]] | None:
    """The parts in the form of chat completions. Raises `UserError` for a part without what its type names."""
    if parts is None:
        return None
    found: list[dict[str, Any]] = []
    for n, part in enumerate(parts):
        refuse_others(part, f"{place}.{n}.")
        field = "image_url" if part.type == "input_image" else "text"
        if (value := getattr(part, field)) is None:
            raise UserError(
                f"'{place}.{n}' is of type '{part.type}'; give its '{field}'", "invalid_request", f"{place}.{n}.{field}"
            )
        found.append({"type": field, field: value})
    return found
