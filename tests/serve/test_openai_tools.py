"""Tools of chat completions: which are taken, what the model is asked, and what OpenAI's client reads."""

from __future__ import annotations

import json

import pytest
from support.serve_fakes import INFO, base64_png

from lumen_ray.answer import Answer, AnswerPart
from lumen_ray.inference.request import ANY_ROUTE, Routing
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.wire.results import result_schema
from lumen_ray.wire.tools import TOOLS

CHAT = "/v1/chat/completions"
URL = "data:image/png;base64," + base64_png()
SIZE = (16, 20)


def message(text="find every red circle", with_image=True):
    image = [{"type": "image_url", "image_url": {"url": URL}}] if with_image else []
    return {"role": "user", "content": [{"type": "text", "text": text}, *image]}


def tool(name, **function):
    return {"type": "function", "function": {"name": name, **function}}


def ask(client, *names, messages=None, **fields):
    tools = [tool(name) for name in names]
    return client.post(CHAT, json={"messages": messages or [message()], "tools": tools, **fields})


def found(phrase="red circle", **extra):
    return Prediction(phrase, Boxes([[1, 2, 3, 4], [2, 2, 4, 4]], SIZE), [0.8, 0.7], **extra)


def answers(backend, **fields):
    """Lets the backend answer, also in pieces, with `fields`; returns the requests it gets."""
    asked = []
    answer = Answer("chat", SIZE, **fields)

    async def infer(image, requests, max_new_tokens):
        asked.extend(requests)
        return [answer]

    async def stream(image, requests, max_new_tokens):
        asked.extend(requests)
        for word in (answer.text or "").split():
            yield word + " "
        yield answer

    backend.infer, backend.stream = infer, stream
    return asked


def test_the_published_tools_are_taken_as_they_are(client, backend):
    published = client.get("/v1/tools").json()
    assert [entry["function"]["name"] for entry in published["tools"]] == list(TOOLS)
    assert set(TOOLS) == {"detect", "segment", "ground", "pose", "count", "generate", "edit"}
    assert published["results"]["detect"] == result_schema("detect")
    response = client.post(CHAT, json={"messages": [message()], "tools": published["tools"], "tool_choice": "auto"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("names", "choice", "routing"),
    [
        ((), None, ANY_ROUTE),
        (("detect", "segment"), None, Routing(("[DET]", "[SEG]"))),
        (("detect", "count"), "auto", Routing(("[DET]",))),
        (("detect", "segment"), "none", Routing(())),
        (("detect", "segment"), "required", Routing(("[DET]", "[SEG]"), True)),
        (("detect", "segment"), tool("segment"), Routing(("[SEG]",), True)),
        (("detect", "segment"), {"type": "function", "name": "segment"}, Routing(("[SEG]",), True)),
        (
            ("detect", "segment", "pose"),
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("pose"), tool("detect")]}},
            Routing(("[POSE]", "[DET]")),
        ),
    ],
)
def test_the_choice_says_where_the_llm_may_send_the_prompt(client, backend, names, choice, routing):
    response = ask(client, *names, tool_choice=choice)
    assert response.status_code == 200, response.text
    (request,) = backend.calls[0][1]
    assert request.routing == routing and request.text == "find every red circle"


def test_one_call_at_most_if_calls_may_not_be_parallel(client, backend):
    ask(client, "detect", parallel_tool_calls=False)
    assert backend.calls[0][1][0].routing == Routing(("[DET]",), is_single=True)


WRONG = {
    "own function": ({"tools": [tool("get_weather")]}, "unknown_tool", "tools.0.function.name", "no function of the"),
    "near name": ({"tools": [tool("detct")]}, "unknown_tool", "tools.0.function.name", "did you mean 'detect'?"),
    "a text task": ({"tools": [tool("caption")]}, "unknown_tool", "tools.0.function.name", "tools: detect, ground"),
    "choice without tools": ({"tool_choice": "required"}, "invalid_request", "tool_choice", "needs 'tools'"),
    "unlisted choice": (
        {"tools": [tool("detect")], "tool_choice": tool("segment")}, "unknown_tool", "tool_choice", "one of: detect",
    ),
    "odd choice": (
        {"tools": [tool("detect")], "tool_choice": "sometimes"}, "invalid_request", "tool_choice", "'required'",
    ),
    "odd mode": (
        {"tools": [tool("detect")], "tool_choice": {"type": "allowed_tools", "mode": "any", "tools": [1]}},
        "invalid_request", "tool_choice", "allowed_tools",
    ),
    "other arguments": (
        {"tools": [tool("detect", parameters={"properties": {"what": {"type": "string"}}})]},
        "invalid_request", "tools.0.function.parameters", "'classes' alone",
    ),
    "more arguments": (
        {"tools": [tool("ground", parameters={"type": "object", "required": ["text", "limit"]})]},
        "invalid_request", "tools.0.function.parameters", "'text' alone",
    ),
    "functions": ({"functions": [{"name": "detect"}]}, "unsupported_parameter", "functions", "listed in 'tools'"),
    "no image": (
        {"messages": [message(with_image=False)], "tools": [tool("detect")], "tool_choice": "required"},
        "missing_image", "tool_choice", "detect need an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason", "field", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_called_is_refused_by_name(client, backend, body, reason, field, words):
    response = client.post(CHAT, json={"messages": [message()], **body})
    error = response.json()["error"]
    assert (response.status_code, error["reason"], error["param"]) == (400, reason, field), error
    assert words in error["message"] and backend.calls == []


def test_a_tool_without_a_decoder_is_refused(client, backend, monkeypatch):
    monkeypatch.setitem(INFO, "tasks", ["chat", "detect"])
    error = ask(client, "detect", "pose").json()["error"]
    assert error["reason"] == "no_decoder" and "'pose'" in error["message"]
    assert len(client.get("/v1/tools").json()["tools"]) == 1


def test_a_routed_answer_is_a_call_with_its_result(client, backend):
    answers(backend, predictions=[found()], route="[DET]", text="here :")
    body = ask(client, "segment", "detect").json()
    (choice,) = body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "here :")
    assert call["function"] == {"name": "detect", "arguments": '{"classes": ["red circle"]}'}
    text, result = body["lumen"]["parts"]
    assert text == {"type": "text", "text": "here :"}
    assert (result["type"], result["task"], result["phrase"]) == ("instances", "detect", "red circle")
    assert result["tool_call_id"] == call["id"] and result["text"] == "red circle: 2 found"
    assert result["instances"] == body["lumen"]["instances"] and len(result["instances"]) == 2


def test_an_answer_in_text_calls_nothing(client, backend):
    answers(backend, text="two")
    (choice,) = ask(client, "detect").json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "two"} and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("names", "route", "text", "name", "arguments"),
    [
        (("detect", "count"), "[DET]", "count every red circle", "count", {"classes": ["red circle"]}),
        (("detect", "count"), "[DET]", "find every red circle", "detect", {"classes": ["red circle"]}),
        (("count",), "[DET]", "find every red circle", "count", {"classes": ["red circle"]}),
        (("ground",), "[GRD]", "ground a red circle", "ground", {"text": "red circle"}),
        (("pose", "segment"), "[POSE]", "how do they stand ?", "pose", {"classes": ["red circle"]}),
    ],
)
def test_the_prompt_names_the_tool_of_those_with_one_token(client, backend, names, route, text, name, arguments):
    answers(backend, predictions=[found()], route=route)
    (choice,) = ask(client, *names, messages=[message(text)]).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == name and json.loads(call["function"]["arguments"]) == arguments
    assert choice["message"]["content"] is None


def test_links_in_a_text_are_calls_beside_it(client, backend):
    parts = [
        AnswerPart("a red circle"), AnswerPart(route="[DET]", prediction=found()),
        AnswerPart(" and a square"), AnswerPart(route="[SEG]", prediction=found("square")),
    ]  # fmt: skip
    predictions = [part.prediction for part in parts if part.prediction]
    answers(backend, text="a red circle and a square", route="[DET]", predictions=predictions, parts=parts)
    body = ask(client, "detect", "segment").json()
    chosen = body["choices"][0]["message"]
    assert chosen["content"] == "a red circle and a square"
    assert [call["function"]["name"] for call in chosen["tool_calls"]] == ["detect", "segment"]
    ids = [call["id"] for call in chosen["tool_calls"]]
    assert [part.get("tool_call_id") for part in body["lumen"]["parts"]] == [None, ids[0], None, ids[1]]


def test_a_picture_is_the_result_of_a_call(client, backend):
    import numpy as np

    answers(backend, images=[np.zeros((8, 8, 3), np.uint8)], route="[GEN]")
    body = ask(client, "generate", messages=[message("draw a red circle", False)], tool_choice="required").json()
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"text": "a red circle"}
    (part,) = body["lumen"]["parts"]
    assert (part["type"], part["task"], part["text"]) == ("images", "generate", "a picture: a red circle")
    assert len(body["lumen"]["images"]) == 1


def test_a_conversation_that_ends_with_a_result_is_answered_by_its_text(client, backend):
    answers(backend, predictions=[found()], route="[DET]")
    body = ask(client, "detect").json()
    called, part = body["choices"][0]["message"], body["lumen"]["parts"][-1]
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": json.dumps(part)}
    asked = answers(backend, text="green")
    for fields in ({}, {"tools": []}, {"n": 2, "logprobs": True}):
        again = ask(client, "detect", messages=[message(), called, result], **fields).json()
        assert again["choices"][-1]["message"] == {"role": "assistant", "content": "red circle: 2 found"}
        assert again["choices"][-1]["finish_reason"] == "stop" and again["lumen"]["height"] == 16
    assert asked == []
    later = [message(), called, result, message("and squares ?", False)]
    assert ask(client, "detect", messages=later).status_code == 200
    assert asked[0].history == (("find every red circle", "red circle: 2 found"),)
    refused = ask(client, "detect", messages=[message(), called, result], tool_choice="required").json()["error"]
    assert (refused["reason"], refused["param"]) == ("unsupported_conversation", "tool_choice")


@pytest.fixture
def chat(client):
    openai = pytest.importorskip("openai", reason="needs openai")
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client, max_retries=0).chat


def test_openais_client_reads_calls_and_sends_them_back(chat, client, backend):
    answers(backend, predictions=[found()], route="[DET]")
    tools = client.get("/v1/tools").json()["tools"]
    messages = [message()]
    completion = chat.completions.create(model="nano", messages=messages, tools=tools)
    (call,) = completion.choices[0].message.tool_calls
    assert call.type == "function" and json.loads(call.function.arguments) == {"classes": ["red circle"]}
    part = completion.lumen["parts"][0]
    messages += [completion.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": part["text"]}]
    completion = chat.completions.create(model="nano", messages=messages, tools=tools)
    assert completion.choices[0].message.content == "red circle: 2 found"
    chunks = list(chat.completions.create(model="nano", messages=messages, tools=tools, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "red circle: 2 found"


def test_openais_client_reads_typed_arguments(chat, backend):
    import openai
    from pydantic import BaseModel

    class Detect(BaseModel):
        classes: list[str]

    answers(backend, predictions=[found()], route="[DET]")
    tools = [openai.pydantic_function_tool(Detect, name="detect")]
    completion = chat.completions.parse(model="nano", messages=[message()], tools=tools)
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Detect(classes=["red circle"])


def test_openais_client_reads_streamed_calls(chat, client, backend):
    answers(backend, predictions=[found()], route="[DET]", text="here :")
    tools = client.get("/v1/tools").json()["tools"]
    with chat.completions.stream(model="nano", messages=[message()], tools=tools) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds and "content.delta" in kinds
    (choice,) = completion.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "detect")
    assert json.loads(call.function.arguments) == {"classes": ["red circle"]} and call.id.startswith("call_")


def masks():
    import numpy as np

    return Masks.from_arrays(np.ones((2, *SIZE), bool))


def points():
    import numpy as np

    return Keypoints(np.full((2, 2, 3), 0.5), ("top", "left"), SIZE)


@pytest.mark.parametrize("name", TOOLS)
def test_a_result_as_json_fits_its_schema(client, backend, name):
    import jsonschema
    import numpy as np

    route = {"detect": "[DET]", "count": "[DET]", "ground": "[GRD]", "segment": "[SEG]", "pose": "[POSE]"}.get(name)
    extra = {"segment": {"masks": masks()}, "pose": {"keypoints": points()}}.get(name, {})
    fields = {"predictions": [found(**extra)]} if route else {"images": [np.zeros((8, 8, 3), np.uint8)]}
    asked = answers(backend, route=route or f"[{'GEN' if name == 'generate' else 'EDIT'}]", **fields)
    schema = client.get("/v1/tools").json()["results"][name]
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
    body = client.post(CHAT, json={"messages": [message()], "response_format": form}).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    result = json.loads(choice["message"]["content"])
    jsonschema.validate(result, schema)
    assert asked[0].routing.is_required and asked[0].routing.tokens == (asked[0].routing.tokens[0],)
    if name == "count":
        assert result == {"counts": {"red circle": 2}}


def test_openais_client_reads_a_typed_result(chat, backend):
    from pydantic import BaseModel

    class Object(BaseModel):
        phrase: str
        score: float
        box: list[float]

    class Detect(BaseModel):
        """What is in the picture."""

        instances: list[Object]

    answers(backend, predictions=[found()], route="[DET]")
    completion = chat.completions.parse(model="nano", messages=[message()], response_format=Detect)
    assert completion.choices[0].message.parsed.instances[0] == Object(phrase="red circle", score=0.8, box=[1, 2, 3, 4])
    with chat.completions.stream(model="nano", messages=[message()], response_format=Detect) as stream:
        assert stream.get_final_completion().choices[0].message.parsed.instances[1].score == 0.7


LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("name", "schema", "field", "words"),
    [
        ("person", {}, "name", "unknown result 'person'"),
        ("detect", None, "schema", "not that of the result of 'detect'"),
        ("detect", {"type": "object", "properties": {"x": {"type": "string"}}}, "schema", "GET /v1/tools"),
        ("detect", result_schema("segment"), "schema", "GET /v1/tools"),
        ("detect", LOOP, "schema", "GET /v1/tools"),
        ("detect", {**result_schema("detect"), "minProperties": 3}, "schema", "GET /v1/tools"),
    ],
)
def test_another_schema_is_refused_and_says_why(client, backend, name, schema, field, words):
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    error = client.post(CHAT, json={"messages": [message()], "response_format": form}).json()["error"]
    assert error["param"] == f"response_format.json_schema.{field}" and words in error["message"], error
    assert backend.calls == []


def test_a_schema_and_tools_exclude_each_other(client):
    form = {"type": "json_schema", "json_schema": {"name": "detect", "schema": result_schema("detect")}}
    error = ask(client, "detect", response_format=form).json()["error"]
    assert error["reason"] == "unsupported_parameter" and "exclude each other" in error["message"]
