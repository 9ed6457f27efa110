"""`/v1/responses`: what is taken, and what OpenAI's client reads, whole and in events."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.answer import Answer, TokenUsage
from lumen_ray.inference.request import Routing
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Unavailable
from lumen_ray.structures import Boxes, Prediction
from lumen_ray.wire import schemas
from lumen_ray.wire.conversation import ChatMessage
from lumen_ray.wire.responses import ResponsesRequest, parse_responses

RESPONSES = "/v1/responses"
URL = "data:image/png;base64," + base64_png()
IMAGE = {"type": "input_image", "image_url": URL, "detail": "auto"}
QUESTION = {"role": "user", "content": [{"type": "input_text", "text": "find every red circle"}, IMAGE]}
TOOLS = [{"type": "function", "name": "detect", "parameters": None, "strict": True}]


def ask(client, given="hello", **fields):
    return client.post(RESPONSES, json={"input": given, **fields})


@pytest.fixture
def responses(client):
    openai = pytest.importorskip("openai", reason="needs openai")
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client, max_retries=0).responses


def answers(backend, **fields):
    """Lets the backend answer, also in pieces, with `fields`; returns the requests it gets."""
    asked = []
    answer = Answer("chat", (16, 20), **fields)

    async def infer(image, requests, max_new_tokens):
        asked.extend(requests)
        return [answer]

    async def stream(image, requests, max_new_tokens):
        asked.extend(requests)
        for n, word in enumerate((answer.text or "").split()):
            yield f" {word}" if n else word
        yield answer

    backend.infer, backend.stream = infer, stream
    return asked


def routed(backend, text=None):
    found = Prediction("red circle", Boxes([[1, 2, 3, 4]], (16, 20)), [0.8])
    return answers(backend, predictions=[found], route="[DET]", text=text)


def test_a_text_is_a_question(client, backend):
    body = ask(client, instructions="be brief", max_output_tokens=7, model="nano", store=False).json()
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "nano@abc123")
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"][0]["text"] == "chat says hello" and body["lumen"]["text"] == "chat says hello"
    assert body["instructions"] == "be brief" and body["store"] is False and body["error"] is None
    image, (request,), most = backend.calls[0]
    assert image is None and (request.system, request.text, most) == ("be brief", "hello", 7)


def test_items_are_a_conversation(client, backend):
    given = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}]},
        QUESTION,
    ]  # fmt: skip
    response = ask(client, given)
    assert response.status_code == 200, response.text
    image, (request,), _ = backend.calls[0]
    assert image.shape == (16, 20, 3) and request.system == "be brief"
    assert (request.history, request.text) == ((("hi", "hello"),), "find every red circle")


def test_openais_client_reads_a_response(responses, backend):
    answers(backend, text="a b", usage=TokenUsage(70, 2), tokens=["a", " b"], log_probs=[-0.5, -1.0])
    response = responses.create(
        model="nano", input=[QUESTION], temperature=0, top_p=1, include=["message.output_text.logprobs"]
    )
    assert response.output_text == "a b" and response.status == "completed" and response.id.startswith("resp_")
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (70, 2, 72)
    assert [entry.logprob for entry in response.output[0].content[0].logprobs] == [-0.5, -1.0]
    type(response).model_validate(response.model_dump())


def test_openais_client_reads_a_response_that_was_cut(responses, backend):
    answers(backend, text="a", is_cut=True)
    response = responses.create(model="nano", input="hello")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert [event.type for event in responses.create(model="nano", input="hello", stream=True)][-1] == (
        "response.incomplete"
    )


def test_openais_client_reads_calls_and_sends_them_back(responses, backend):
    asked = routed(backend)
    given = [QUESTION]
    response = responses.create(
        model="nano", input=given, tools=TOOLS, tool_choice={"type": "function", "name": "detect"}
    )
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "detect")
    assert json.loads(call.arguments) == {"classes": ["red circle"]} and asked[0].routing == Routing(("[DET]",), True)
    (part,) = response.lumen["parts"]
    assert part["tool_call_id"] == call.call_id and part["instances"][0]["box"] == [1, 2, 3, 4]
    type(response).model_validate(response.model_dump())
    given += response.output
    given.append({"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(part)})
    assert responses.create(model="nano", input=given, tools=TOOLS).output_text == "red circle: 1 found"
    with responses.stream(model="nano", input=given, tools=TOOLS) as stream:
        assert stream.get_final_response().output_text == "red circle: 1 found"
    asked = answers(backend, text="green")
    responses.create(model="nano", input=[*given, {"role": "user", "content": "which colour ?"}])
    assert asked[0].history == (("find every red circle", "red circle: 1 found"),)


def test_calls_in_a_row_and_the_text_before_them_are_one_answer(client, backend):
    said = {"role": "assistant", "content": "see :"}
    calls = [{"type": "function_call", "call_id": n, "name": "detect", "arguments": "{}"} for n in "ab"]
    results = [{"type": "function_call_output", "call_id": n, "output": f"{n} found"} for n in "ab"]
    response = ask(client, [QUESTION, said, *calls, *results, {"role": "user", "content": "which ?"}])
    assert response.status_code == 200, response.text
    assert backend.calls[0][1][0].history == (("find every red circle", "see : a found b found"),)


def test_openais_client_reads_a_typed_result(responses, backend):
    from pydantic import BaseModel

    class Count(BaseModel):
        counts: dict[str, int]

    routed(backend)
    form = responses.parse(model="nano", input=[QUESTION], text_format=Count)
    assert form.output_parsed == Count(counts={"red circle": 1})


TEXT_EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    *["response.output_text.delta"] * 2, "response.output_text.done", "response.content_part.done",
    "response.output_item.done",
]  # fmt: skip
CALL_EVENTS = [
    "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
    "response.output_item.done",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "is_routed", "kinds"),
    [
        ("red circle", False, [*TEXT_EVENTS, "response.completed"]),
        ("here :", True, [*TEXT_EVENTS, *CALL_EVENTS, "response.completed"]),
        (None, True, [*TEXT_EVENTS[:2], *CALL_EVENTS, "response.completed"]),
    ],
)
def test_openais_client_reads_the_events(responses, backend, text, is_routed, kinds):
    if is_routed:
        routed(backend, text)
    else:
        answers(backend, text=text, usage=TokenUsage(70, 2))
    events = list(responses.create(model="nano", input=[QUESTION], tools=TOOLS, stream=True))
    assert [event.type for event in events] == kinds
    assert [event.sequence_number for event in events] == list(range(len(kinds)))
    for event in events:
        type(event).model_validate(event.model_dump())
    assert events[-1].response.output_text == (text or "") and events[-1].response.lumen["timing_ms"]["total"] >= 0
    with responses.stream(model="nano", input=[QUESTION], tools=TOOLS) as stream:
        final = stream.until_done().get_final_response()
    assert final.output_text == (text or "") and [item.type for item in final.output][-1] == (
        "function_call" if is_routed else "message"
    )


@pytest.mark.parametrize(
    ("choice", "echo"),
    [
        (None, "auto"),
        ("required", "required"),
        ({"type": "function", "name": "detect", "x": 1}, {"type": "function", "name": "detect"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "detect"}]},
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "detect"}]},
        ),
    ],
)
def test_the_response_has_the_tools_of_the_request(client, choice, echo):
    deep: dict = {}
    for _ in range(400):
        deep = {"x": deep}
    tools = [{**TOOLS[0], "parameters": {"type": "object", "x": deep}}]
    body = ask(client, [QUESTION], tools=tools, tool_choice=choice).json()
    assert body["tool_choice"] == echo
    (tool,) = body["tools"]
    assert tool["name"] == "detect" and set(tool["parameters"]["properties"]) == {"classes"}


def test_an_answer_without_text_and_calls_is_an_empty_message(client, backend):
    routed(backend)
    assert ask(client, [QUESTION]).json()["output"][0]["content"][0]["text"] == ""


class Failing(FakeBackend):
    async def stream(self, image, requests, max_new_tokens):
        yield "a"
        raise Unavailable("a replica died")


def test_openais_client_raises_an_error_behind_some_text(settings):
    openai = pytest.importorskip("openai", reason="needs openai")
    client = TestClient(create_api(Failing(), settings))
    asked = openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client, max_retries=0)
    with pytest.raises(openai.APIError, match="a replica died"):
        list(asked.responses.create(model="nano", input="hello", stream=True))
    *_, last = client.post(RESPONSES, json={"input": "hello", "stream": True}).text.strip().split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["code"] == "unavailable"


#: parameter -> values that are taken, values that are refused
PARAMETERS = {
    "model": ([None, "nano"], ["gpt", 5]),
    "instructions": ([None, "be brief"], [5]),
    "max_output_tokens": ([None, 1, 4096], [0, "x"]),
    "temperature": ([None, 0], [0.7, "x"]),
    "top_p": ([None, 1], [0.5]),
    "stream": ([None, False, True], ["x"]),
    "stream_options": ([None, {"include_obfuscation": False}], [{"include_obfuscation": True}, {"x": 1}]),
    "tools": (
        [None, [], [{"type": "function", "name": "detect"}]],
        [[{"type": "web_search"}], [{"type": "function", "name": "get_weather"}], [{"type": "function"}]],
    ),
    "tool_choice": ([None, "none", "auto"], ["required", {"type": "file_search"}]),
    "parallel_tool_calls": ([None, True, False], ["x"]),
    "text": (
        [None, {}, {"format": {"type": "text"}, "verbosity": "medium"}],
        [{"format": {"type": "json_object"}}, {"format": {"type": "json_schema"}}, {"verbosity": "low"}],
    ),
    "include": ([None, [], ["message.output_text.logprobs"]], [["reasoning.encrypted_content"], "x"]),
    "top_logprobs": ([None, 0], [5, 21]),  # without include
    "store": ([None, False], [True]),
    "previous_response_id": ([None], ["resp_1"]),
    "conversation": ([None], ["conv_1"]),
    "prompt": ([None], [{"id": "x"}]),
    "background": ([None, False], [True]),
    "background_options": ([None, {}], [{"completion_window": "2h"}]),
    "reasoning": ([None, {}, {"effort": "none"}], [{"effort": "high"}]),
    "truncation": ([None, "disabled"], ["auto"]),
    "context_management": ([None, []], [[{"type": "compaction"}]]),
    "max_tool_calls": ([None], [3]),
    "moderation": ([None], [{"model": "x"}]),
    "access_programs": ([None], [{"cyber": "standard"}]),
    "image": ([None, {"context_compression": "disabled"}], [{"context_compression": "enabled"}]),
    "service_tier": ([None, "auto", "default"], ["flex"]),
    "metadata": ([None, {"run": "7"}], [{"run": 7}]),
    "prompt_cache_key": ([None, "key"], [5]),
    "prompt_cache_retention": ([None, "24h"], [5]),
    "prompt_cache_options": ([None, {"mode": "implicit"}], ["x"]),
    "safety_identifier": ([None, "someone"], [5]),
    "user": ([None, "someone"], [5]),
}


def test_every_parameter_has_a_case_and_a_description(client):
    assert set(PARAMETERS) == set(ResponsesRequest.model_fields) - {"input"}
    properties = client.get("/openapi.json").json()["components"]["schemas"]["ResponsesRequest"]["properties"]
    assert all(parameter["description"] for parameter in properties.values())


def test_every_parameter_of_openais_client_is_known():
    create = pytest.importorskip("openai.types.responses.response_create_params", reason="needs openai")
    assert set(create.ResponseCreateParamsBase.__annotations__) <= set(ResponsesRequest.model_fields)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (taken, _) in PARAMETERS.items() for v in taken])
def test_a_value_that_is_taken(client, backend, name, value):
    response = ask(client, **{name: value})
    assert response.status_code == 200, response.text
    assert backend.calls[0][1][0].text == "hello"


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (_, refused) in PARAMETERS.items() for v in refused])
def test_another_value_is_refused_by_its_name(client, backend, name, value):
    error = ask(client, **{name: value}).json()["error"]
    assert error["message"].startswith("unknown model") or f"{name}" in error["message"], error
    assert error["param"].partition(".")[0] == name and backend.calls == []


def test_a_long_row_of_calls_is_read_in_one_go(monkeypatch):
    """Each call is added to its answer, not the answer copied for each."""
    parsed = []
    parse = schemas.parse
    monkeypatch.setattr(schemas, "parse", lambda model, data: parsed.append(model) or parse(model, data))
    call = {"type": "function_call", "call_id": "1", "name": "x"}
    asked = parse_responses({"input": [{"role": "user", "content": "x"}, *[call] * 300]}, takes_sampling=False)
    assert len(asked.chat.messages[1].tool_calls) == 300 and parsed == [ResponsesRequest, ChatMessage, ChatMessage]


def test_a_long_conversation_is_refused_before_it_is_read(settings):
    few = settings.model_copy(update={"limits": settings.limits.model_copy(update={"max_messages": 2})})
    error = ask(TestClient(create_api(FakeBackend(), few)), [None] * 3).json()["error"]
    assert (error["reason"], error["param"]) == ("too_many_messages", "input")


@pytest.mark.parametrize("text", [r'"\ud800"', "NaN", "-Infinity", "1e999", "\ud800"])
@pytest.mark.parametrize(
    "body",
    [
        '{"input": "x", "metadata": {"a": %s}}',
        '{"input": "x", "stream": true, "text": {"format": {"type": "text", "description": %s}}}',
        '{"input": "x", "text": {"format": {"type": "text", "schema": {"title": [%s]}}}}',
        '{"input": [{"type": "function_call", "name": "x", "call_id": %s}]}',
    ],
)
def test_what_no_answer_can_repeat_is_refused(client, body, text):
    response = client.post(RESPONSES, content=(body % text).encode("utf-8", "surrogatepass"))
    assert (response.status_code, response.json()["error"]["reason"]) == (400, "invalid_json"), response.text


def test_characters_beyond_the_first_plane_may_be_escaped(client):
    response = client.post(RESPONSES, content=r'{"input": "x", "metadata": {"a": "\ud83d\ude00 \\ud83d"}}')
    assert response.json()["metadata"] == {"a": "😀 \\ud83d"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"),
        (5, "input"),
        (None, "input"),
        ([{"type": "item_reference", "id": "x"}], "input.0.type"),
        ([{"content": "x"}], "input.0.role"),
        ([{"role": "bot", "content": "x"}], "input.0.role"),
        ([QUESTION, QUESTION], "input.1"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "input.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}], "input.0.content.0.file_id"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input.0.content.0.image_url"),
        ([{"role": "user", "content": ""}], "input.0.content"),
        ([QUESTION, {"type": "function_call", "call_id": "c"}], "input.1"),
        ([QUESTION, {"type": "function_call", "call_id": "c", "name": "detect", "arguments": "{}"}], "input.1"),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], "input.0"),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "input.0"),  # beside instructions
    ],
)
def test_input_that_is_no_conversation_is_refused_by_its_place(client, backend, given, param):
    response = ask(client, given, instructions="be brief")
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert backend.calls == []
