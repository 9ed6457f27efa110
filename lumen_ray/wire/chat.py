"""The request for a chat completion in OpenAI's format, as far as the model supports it: conversations with and without
images.

Parameters that cannot be honoured are taken at their neutral value and refused at any other. The answer is in
`completions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.wire import schemas
from lumen_ray.wire.conversation import ChatMessage, Conversation, read_conversation
from lumen_ray.wire.images import GivenImage, given_image
from lumen_ray.wire.neutral import Neutral, refuse_others
from lumen_ray.wire.requests import Asked
from lumen_ray.wire.settings import MAX_NEW_TOKENS, Limits
from lumen_ray.wire.tools import UNUSED, Tool, ToolUse, read_tools

#: where a server takes these requests; the one URL of those in batch files
CHAT_URL = "/v1/chat/completions"
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
NEEDS_SAMPLING = "taken if the server's setting openai_sampling is on"
_OLD_FUNCTIONS = "functions are listed in 'tools'"


def _as_stops(value: Any) -> Any:
    """A plain text stands for a list of one."""
    if isinstance(value, str):
        return [value]
    if value is not None and not isinstance(value, list):
        raise UserError("'stop' is a text or a list of texts")
    return value


TopLogProbs = Annotated[
    int | None,
    Field(
        ge=0,
        le=20,
        description="log probabilities of so many most probable tokens at each place, with those of the answer",
    ),
]


class StreamOptions(Settings):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="whether a last event has the numbers of tokens")
    include_obfuscation: Annotated[bool | None, Neutral("events are not padded", False)] = None


class JsonSchema(Settings):
    """The schema of the answer's text."""

    name: str = Field(description="the tool whose result the text is to be")
    schema_: Any = Field(None, alias="schema", description="that of its result, as at GET /v1/tools")
    strict: bool | None = Field(None, description=f"{UNUSED}: the text always fits")
    description: str | None = Field(None, description=UNUSED)


class ResponseFormat(Settings):
    """The form of the answer's text."""

    type: Literal["text", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="of type json_schema")


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
        description=f"0 or null takes the most probable tokens; above 0, {NEEDS_SAMPLING}, they are drawn",
    )
    top_p: schemas.Fraction | None = Field(
        None,
        description=f"draw from the most probable tokens with this probability in sum; below 1, {NEEDS_SAMPLING}",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        le=2**31,
        description=f"not in OpenAI's API: draw from so many tokens at most; above 0, {NEEDS_SAMPLING}; -1, 0: all",
    )
    repetition_penalty: schemas.Penalty | None = Field(
        None,
        description="not in OpenAI's API: above 1, tokens of prompt and answer become less probable; other than 1, "
        f"{NEEDS_SAMPLING}",
    )
    stop: Annotated[list[str] | None, BeforeValidator(_as_stops, json_schema_input_type=str | list[str] | None)] = (
        Field(None, description=f"a text that ends the answer, or up to 16 of them; {NEEDS_SAMPLING}")
    )
    seed: int | None = Field(
        None, description="of the tokens drawn: the same request with the same seed gets the same answer; null: any"
    )
    logprobs: bool | None = Field(None, description="whether the answer has the log probabilities of its tokens")
    top_logprobs: TopLogProbs = None
    n: int | None = Field(
        None, ge=1, description="answers, up to limits.max_choices, equal ones unless they are drawn; null is 1"
    )
    frequency_penalty: Annotated[float | None, Neutral(_NO_PENALTY, 0)] = None
    presence_penalty: Annotated[float | None, Neutral(_NO_PENALTY, 0)] = None
    logit_bias: Annotated[Any, Neutral("the probabilities of tokens are not changed", {})] = None
    stream: bool | None = Field(
        None, description="whether the answer comes in pieces, as server-sent events, while it is written"
    )
    stream_options: StreamOptions | None = Field(None, description="of a streamed answer")
    response_format: ResponseFormat | None = Field(
        None, description="null or type text; type json_schema for the result of a tool, which is then called"
    )
    modalities: Annotated[Any, Neutral(_TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, Neutral(_TEXT_ONLY)] = None
    tools: list[Tool] | None = Field(None, description="the decoders that may be called, see GET /v1/tools")
    functions: Annotated[Any, Neutral(_OLD_FUNCTIONS, [])] = None
    tool_choice: Any = Field(
        None,
        description="null or auto: the model chooses text or tools; required: one of the tools; an object of type "
        "function: that one; an object of type allowed_tools: some of them; none: text",
    )
    function_call: Annotated[Any, Neutral(_OLD_FUNCTIONS, "none", "auto")] = None
    prediction: Annotated[Any, Neutral("a predicted answer is not used")] = None
    reasoning_effort: Annotated[Any, Neutral("the model answers without reasoning", "none")] = None
    verbosity: Annotated[Any, Neutral("the length of answers cannot be steered", "medium")] = None
    web_search_options: Annotated[Any, Neutral("the model does not search the web")] = None
    moderation: Annotated[Any, Neutral("nothing is moderated")] = None
    store: Annotated[bool | None, Neutral("answers are not stored", False)] = None
    service_tier: Annotated[Any, Neutral("all requests are served alike", "auto", "default")] = None

    parallel_tool_calls: bool | None = Field(None, description="false: an answer has one call at most")
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
    def choices(self) -> int:
        """The number of answers."""
        return self.n or 1

    @property
    def question(self) -> str:
        """The text of the last user message."""
        last = next((message for message in reversed(self.messages) if message.role == "user"), None)
        return " ".join(part.text for part in (last and last.content) or () if part.text)

    @property
    def tool_use(self) -> ToolUse:
        """How tools are used. Raises `UserError` for what cannot be honoured."""
        functions = [(f"tools.{n}.function", tool.function) for n, tool in enumerate(self.tools or ())]
        return read_tools(functions, self.tool_choice, self.parallel_tool_calls, self._schema())

    def _schema(self) -> tuple[str, Any, str] | None:
        """The name of the schema of the answer's text, the schema, and its place; None for plain text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.json_schema is None:
            raise UserError(
                "'response_format.json_schema' is missing; give the result of a tool, see GET /v1/tools",
                "invalid_request",
                "response_format.json_schema",
            )
        return form.json_schema.name, form.json_schema.schema_, "response_format.json_schema"

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
    _ = chat.tool_use
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
    check_chat(chat, takes_sampling)
    return chat


def check_chat(chat: ChatRequest, takes_sampling: bool) -> None:
    """Raises `UserError` for parameters that cannot be honoured together, and those of sampling unless
    `takes_sampling`."""
    if chat.stream and chat.choices > 1:
        raise UserError("a streamed answer is one; leave 'n' or 'stream' out", "unsupported_parameter", "n")
    if chat.stream and chat.logprobs:
        raise UserError(
            "streamed answers have no log probabilities; leave 'logprobs' or 'stream' out",
            "unsupported_parameter",
            "logprobs",
        )
    if chat.top_logprobs and not chat.logprobs:
        raise UserError(
            "'top_logprobs' are given beside the log probabilities of the answer; ask for these, or leave it out",
            "unsupported_parameter",
            "top_logprobs",
        )
    if not takes_sampling:
        _refuse_sampling(chat)


def read_chat(
    chat: ChatRequest,
    limits: Limits,
    read_image: Callable[[str, str], GivenImage] = given_image,
    tools: ToolUse | None = None,
    places: Sequence[str] | None = None,
) -> Asked:
    """The conversation as a task about its images, several times if several answers are drawn. One that ends with the
    results of tools is answered by their text. Raises `UserError` for one that the model cannot read.

    `read_image`: (URL, its place in the request) -> the image; `tools`: by default those of `chat`; `places`:
    of the messages in the request.
    """
    if chat.choices > limits.max_choices:
        raise UserError(f"'n' is {chat.choices}; give at most {limits.max_choices}", "too_many_choices", "n")
    conversation = read_conversation(chat.messages, limits.max_images, read_image, places)
    tools = tools or chat.tool_use
    where = conversation.places if len(conversation.images) > 1 else ()  # of a single image the error says enough
    if conversation.result is not None:
        tools.check_ended()
        return Asked(conversation.images, [], places=where, text=conversation.result)
    tools.check_images(len(conversation.images))
    fields = _task_fields(chat, conversation)
    drawn = range(chat.choices if chat.temperature else 1)
    tasks = [("chat", fields if not n or fields.seed is None else _with_seed(fields, fields.seed + n)) for n in drawn]
    turns = tuple(conversation.image_turns[1:])  # the first image stands before all questions
    top = chat.top_logprobs or 0
    return Asked(conversation.images, tasks, turns, where, routing=tools.routing, top_log_probs=top)


def _with_seed(fields: schemas.TaskFields, seed: int) -> schemas.TaskFields:
    return fields.model_copy(update={"seed": seed % 2**63})


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
