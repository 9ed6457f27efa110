"""Tools in OpenAI's formats: the decoders of the model, called by its routing tokens.

A request lists some of them, the LLM routes its answer to one, and the server runs it at once: an answer has the call
and its result. The arguments are the words that the answer is about, as fields of `/v1/<tool>`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from lumen_ray.answer import Answer, AnswerPart
from lumen_ray.config import Settings
from lumen_ray.errors import UserError, suggest
from lumen_ray.inference.request import ANY_ROUTE, Routing, no_decoder
from lumen_ray.tasks import TASKS, task_of_prompt
from lumen_ray.wire.results import result_schema, tool_of_schema

UNUSED = "accepted and without effect"
#: what a task needs -> the field of its request that holds it
_FIELDS = {"classes": "classes", "sentence": "text", "description": "text", "instruction": "text"}
#: names of the tasks that are tools: what the decoders do with words
TOOLS: tuple[str, ...] = tuple(
    task.name for task in TASKS.values() if task.routing_token and task.needs in _FIELDS and not task.derived_from
)
_PURPOSES = {
    "detect": "Find every object of a class, with its box.",
    "segment": "Find every object of a class, with its mask.",
    "ground": "Locate what a phrase names, with its box.",
    "pose": "Find every object of a class, with its keypoints.",
    "count": "Count the objects of a class.",
    "generate": "Draw a picture of a description.",
    "edit": "Change the image as an instruction says.",
}


class Function(Settings):
    """A tool by its name."""

    name: str = Field(description=f"one of {', '.join(TOOLS)}")
    description: str | None = Field(None, description=UNUSED)
    parameters: dict[str, Any] | None = Field(
        None, description="null, or a JSON schema that the arguments fit, as that at GET /v1/tools"
    )
    strict: bool | None = Field(None, description=f"{UNUSED}: arguments always fit the schema")


class Tool(Settings):
    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class ToolUse:
    """How tools are used for an answer. `names`: those that may be called; `routing`: of the request to the model;
    `result`: the tool whose result the text of the answer is, as JSON."""

    names: tuple[str, ...] = ()
    routing: Routing = ANY_ROUTE
    result: str | None = None

    def check_served(self, served: Sequence[str]) -> None:
        """Raises `UserError` for a tool that a model does not have. `served`: names of its tasks."""
        for name in (*self.names, *((self.result,) if self.result else ())):
            if name not in served:
                raise no_decoder(name, served)

    def check_images(self, number: int) -> None:
        """Raises `UserError` if a tool has to be called, and all need an image, of which there is none."""
        names = (self.result,) if self.result else self.names
        if self.routing.is_required and not number and all(TASKS[name].sees_image for name in names):
            raise UserError(f"{' and '.join(names)} need an image; give one", "missing_image", "tool_choice")

    def check_ended(self) -> None:
        """Raises `UserError` if a tool has to be called again, though the conversation ends with the result of one."""
        if self.routing.is_required:
            raise UserError(
                "the conversation ends with the result of a tool, but one has to be called again; leave 'tool_choice' "
                "out, or end with a user message",
                "unsupported_conversation",
                "tool_choice",
            )


NO_TOOLS = ToolUse()


def read_tools(
    functions: Sequence[tuple[str, Function]],
    choice: Any,
    parallel: bool | None,
    schema: tuple[str, Any, str] | None,
) -> ToolUse:
    """The use of tools in a request. Raises `UserError` for what cannot be honoured.

    `functions`: those listed, each with its place; `choice`: the value of `tool_choice`, of either format; `parallel`:
    false for one call at most; `schema`: (name, schema, place) of the answer's text, if it is to be JSON.
    """
    if schema is not None:
        if functions:
            raise UserError(
                f"'{schema[2]}' and 'tools' exclude each other: the text of a call is not JSON; leave one of them out",
                "unsupported_parameter",
                schema[2],
            )
        tool = tool_of_schema(schema[0], schema[1], TOOLS, schema[2])
        return ToolUse((), Routing((_token(tool),), is_required=True, is_single=True), tool)
    if not functions:
        if choice not in (None, "none", "auto"):
            raise UserError(
                "'tool_choice' needs 'tools'; list them, see GET /v1/tools", "invalid_request", "tool_choice"
            )
        return NO_TOOLS
    for place, function in functions:
        _check_function(place, function)
    names, mode = _chosen(choice, list(dict.fromkeys(function.name for _, function in functions)))
    tokens = tuple(dict.fromkeys(_token(name) for name in names))
    return ToolUse(tuple(names), Routing(tokens, is_required=mode == "required", is_single=parallel is False))


def _token(tool: str) -> str:
    token = TASKS[tool].routing_token
    assert token is not None, "tools have decoders"
    return token


def _check_function(place: str, function: Function) -> None:
    if function.name not in TOOLS:
        raise UserError(
            f"'{place}.name' is '{function.name}', but the model's tools are its decoders, and no function of the "
            f"client is called;{suggest(function.name, TOOLS)} tools: {', '.join(TOOLS)}",
            "unknown_tool",
            f"{place}.name",
        )
    field, given = _field(function.name), function.parameters or {}
    properties, required = given.get("properties"), given.get("required")
    fits = properties is None or (isinstance(properties, dict) and field in properties)
    if not fits or not (required is None or (isinstance(required, list) and set(map(str, required)) <= {field})):
        raise UserError(
            f"'{place}.parameters' do not fit the arguments of '{function.name}', which are '{field}' alone; leave "
            "them out, or take those of GET /v1/tools",
            "invalid_request",
            f"{place}.parameters",
        )


def _chosen(choice: Any, listed: list[str]) -> tuple[list[str], str]:
    """(the tools that may be called, the mode "none", "auto" or "required") of a value of `tool_choice`."""
    if choice is None or choice in ("auto", "required"):
        return listed, choice or "auto"
    if choice == "none":
        return [], "none"
    if isinstance(choice, dict) and choice.get("type") == "function":
        return [_listed(choice, listed)], "required"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        given = choice.get("allowed_tools", choice)  # nested in chat completions, flat in responses
        mode, tools = (given.get("mode"), given.get("tools")) if isinstance(given, dict) else (None, None)
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return [_listed(tool, listed) for tool in tools], mode
    raise UserError(
        "'tool_choice' must be 'none', 'auto', 'required', or an object of type 'function' with the name of one of "
        "'tools', or of type 'allowed_tools' with a mode and some of them",
        "invalid_request",
        "tool_choice",
    )


def _listed(chosen: Any, listed: Sequence[str]) -> str:
    """The name in ``{"type": "function", "function": {"name": ...}}`` or its flat form."""
    function = chosen.get("function", chosen) if isinstance(chosen, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in listed:
        raise UserError(
            f"'tool_choice' names {json.dumps(name)}, which is none of 'tools'; name one of: {', '.join(listed)}",
            "unknown_tool",
            "tool_choice",
        )
    return str(name)


def _field(tool: str) -> str:
    return _FIELDS[TASKS[tool].needs]


def describe_tools(served: Sequence[str]) -> dict[str, Any]:
    """The tools of a model with these tasks, in the form of a request, and the schemas of their results."""
    names = [name for name in TOOLS if name in served]
    return {
        "tools": [{"type": "function", "function": definition(name)} for name in names],
        "results": {name: result_schema(name) for name in names},
    }


def definition(name: str) -> dict[str, Any]:
    """A tool as a function: its name, what it does, and the schema of its arguments."""
    field = _field(name)
    kind: dict[str, Any] = {"type": "string", "description": f"the {TASKS[name].needs}"}
    if field == "classes":
        kind = {"type": "array", "items": {"type": "string"}, "description": "names of what to look for"}
    parameters = {"type": "object", "properties": {field: kind}, "required": [field], "additionalProperties": False}
    return {"name": name, "description": _PURPOSES[name], "parameters": parameters, "strict": True}


@dataclass(frozen=True)
class ToolCall:
    """A call of an answer. `arguments`: JSON; `part`: the result, as of the parts of an answer."""

    id: str
    name: str
    arguments: str
    part: dict[str, Any]


def calls_of(answer: Answer, names: Sequence[str], question: str) -> list[ToolCall]:
    """The calls of the tools `names` in the answer to a question, in order; those of a text are its links."""
    if answer.parts is not None:
        linked = [part for part in answer.parts if part.prediction is not None]
    elif answer.images is not None:
        linked = [AnswerPart(route=answer.route)]
    else:
        linked = [AnswerPart(route=answer.route, prediction=prediction) for prediction in answer.predictions]
    named = task_of_prompt(question)
    calls = []
    for part in linked:
        candidates = [name for name in names if _token(name) == part.route]
        if not candidates:
            continue
        is_named = named is not None and named[0] in candidates and answer.parts is None
        calls.append(_call(named[0] if named and is_named else candidates[0], part, named[1] if named else question))
    return calls


def _call(name: str, part: AnswerPart, question: str) -> ToolCall:
    """The call of a tool with the result in `part`; `question`: the words about a picture."""
    number = f"call_{uuid.uuid4().hex}"
    if part.prediction is None:
        phrase = question.strip()
        found = {"type": "images", "task": name, "phrase": phrase, "text": f"a picture: {phrase}"}
    else:
        phrase = part.prediction.phrase
        found = {**part.to_dict(), "task": name, "text": f"{phrase}: {len(part.prediction)} found"}
    field = _field(name)
    arguments = json.dumps({field: [phrase] if field == "classes" else phrase}, ensure_ascii=False)
    return ToolCall(number, name, arguments, {**found, "tool_call_id": number})


def parts_of(answer: Answer, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The texts and results of an answer with calls, in order; every link of a text is a call."""
    if answer.parts is None:
        texts = [AnswerPart(answer.text).to_dict()] if answer.text else []
        return [*texts, *(call.part for call in calls)]
    results = iter(calls)
    return [part.to_dict() if part.prediction is None else next(results).part for part in answer.parts]


def as_read(content: str) -> str:
    """What the model reads of the content of a tool message: of a result that the server gave, its `text`."""
    try:
        part = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if isinstance(part, dict) and "tool_call_id" in part and isinstance(part.get("text"), str):
        return str(part["text"])
    return content
