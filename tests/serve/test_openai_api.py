"""Chat completions: what is honoured, and that the rest is taken at its neutral value only."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import INFO, FakeBackend, base64_png

from lumen_ray.answer import Answer, AnswerPart, TokenUsage
from lumen_ray.errors import UserError
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Overloaded, Unavailable
from lumen_ray.structures import Boxes, Prediction
from lumen_ray.wire.chat import ChatRequest
from lumen_ray.wire.settings import MAX_NEW_TOKENS

CHAT = "/v1/chat/completions"


def message(text="find every red circle", image=None):
    url = {"url": image or "data:image/png;base64," + base64_png()}
    return {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]}


def test_text_answer(client, backend):
    body = {"model": "nano", "messages": [message("what is it ?")], "max_tokens": 7, "temperature": 0, "stream": False}
    result = client.post(CHAT, json=body).json()
    assert result["object"] == "chat.completion" and result["model"] == "nano@abc123"
    assert result["choices"][0]["message"] == {"role": "assistant", "content": "chat says what is it ?"}
    assert backend.calls[0][2] == 7


def test_routed_answer_carries_instances(client, backend):
    async def infer(image, queries, max_new_tokens):
        boxes = Boxes([[1, 2, 3, 4]], image.size)
        return [Answer("chat", image.size, [Prediction("red circle", boxes, [0.8])], route="[DET]")]

    backend.infer = infer
    result = client.post(CHAT, json={"messages": [message()]}).json()
    assert result["choices"][0]["message"]["content"] == ""
    assert result["lumen"]["route"] == "[DET]" and result["lumen"]["instances"][0]["box"] == [1, 2, 3, 4]


def parted(size):
    """An answer with instances in the middle of its text."""
    found = [Prediction("red circle", Boxes([[1, 2, 3, 4]], size), [0.8]), Prediction("square", Boxes([], size), [])]
    parts = [
        AnswerPart("a red circle"),
        AnswerPart(route="[DET]", prediction=found[0]),
        AnswerPart(" and a square"),
        AnswerPart(route="[SEG]", prediction=found[1]),
    ]
    tokens = ["a", " red", " circle", " and", " a", " square"]
    return Answer(
        "chat", size, found, "a red circle and a square", "[DET]", log_probs=[-0.5] * 6, tokens=tokens, parts=parts
    )


def test_an_answer_with_instances_in_its_text(client, backend):
    async def infer(image, queries, max_new_tokens):
        return [parted(image.size)]

    backend.infer = infer
    result = client.post(CHAT, json={"messages": [message()], "logprobs": True}).json()
    (choice,) = result["choices"]
    assert choice["message"]["content"] == "a red circle and a square" and choice["finish_reason"] == "stop"
    assert [entry["token"] for entry in choice["logprobs"]["content"]][-1] == " square"
    instance = {"phrase": "red circle", "score": 0.8, "box": [1.0, 2.0, 3.0, 4.0]}
    parts = [
        {"type": "text", "text": "a red circle"},
        {"type": "instances", "task": "detect", "phrase": "red circle", "instances": [instance]},
        {"type": "text", "text": " and a square"},
        {"type": "instances", "task": "segment", "phrase": "square", "instances": []},
    ]
    assert result["lumen"]["parts"] == parts and result["lumen"]["instances"] == [instance]
    assert result["lumen"]["phrases"] == ["red circle", "square"]
    # the task API has the same parts, and documents them
    body = client.post("/v1/chat", json={"text": "what ?", "image": base64_png()}).json()
    assert body["parts"] == parts and body["text"] == "a red circle and a square"
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    assert {"type", "text", "task", "phrase", "instances"} == set(schema["AnswerPart"]["properties"])
    assert "parts" in schema["TaskResponse"]["properties"]


def test_a_conversation_reaches_the_model(client, backend):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        message("what is it ?"),
    ]
    response = client.post(CHAT, json={"messages": messages})
    assert response.json()["choices"][0]["message"]["content"] == "chat says what is it ?"
    image, (request,), _ = backend.calls[0]
    assert image.shape == (16, 20, 3) and request.sampling == GREEDY
    assert (request.system, request.history, request.text) == ("be brief", (("hello", "hi"),), "what is it ?")


def test_several_images_reach_the_model_with_their_questions(client, backend):
    later = message("what differs ?", "data:image/png;base64," + base64_png(12, 8))
    messages = [message("what is it ?"), {"role": "assistant", "content": "a dog"}, later]
    assert client.post(CHAT, json={"messages": messages}).json()["lumen"]["image"] == 1
    shown, (request,), _ = backend.calls[0]
    assert [image.shape for image in shown] == [(16, 20, 3), (8, 12, 3)]
    assert (request.image_turns, request.history) == ((1,), (("what is it ?", "a dog"),))


def test_the_images_of_a_conversation_share_the_limit_of_pixels(client, backend):
    wide = "data:image/png;base64," + base64_png(100, 60)
    assert client.post(CHAT, json={"messages": [message(image=wide)]}).status_code == 200
    two = [message(image=wide), {"role": "assistant", "content": "x"}, message(image=wide)]
    error = client.post(CHAT, json={"messages": two}).json()["error"]
    assert (error["reason"], error["message"]) == (
        "image_too_large",
        "the images have 12000 pixels together, more than the 10000 pixels allowed; scale them down",
    )


def test_the_broken_one_of_several_images_is_named(client, backend):
    broken = "data:image/png;base64," + base64_png()[:40]
    messages = [message(), {"role": "assistant", "content": "x"}, message(image=broken)]
    error = client.post(CHAT, json={"messages": messages}).json()["error"]
    assert error["reason"] == "broken_image" and error["message"].startswith("'messages.2.content.1.image_url': ")


def test_text_alone(client, backend):
    response = client.post(CHAT, json={"messages": [TEXT_ONLY]})
    assert response.json()["choices"][0]["message"]["content"] == "chat says hello"
    assert backend.calls[0][0] is None


@pytest.mark.parametrize("reason", ["no_system_turn", "context_too_long"])
def test_what_the_model_refuses_is_the_clients_error(client, backend, reason):
    backend.error = UserError("this model has no such turn", reason)
    response = client.post(CHAT, json={"messages": [{"role": "system", "content": "s"}, TEXT_ONLY]})
    assert (response.status_code, response.json()["error"]["reason"]) == (400, reason)


def answers(backend, **fields):
    """Lets the backend answer with `fields`."""

    async def infer(image, requests, max_new_tokens):
        return [Answer("chat", (8, 8), **fields)]

    backend.infer = infer


def test_an_answer_that_was_cut_says_so(client, backend):
    for is_cut, reason in [(True, "length"), (False, "stop")]:
        answers(backend, text="a", is_cut=is_cut)
        (choice,) = client.post(CHAT, json={"messages": [TEXT_ONLY]}).json()["choices"]
        assert choice["finish_reason"] == reason and choice["logprobs"] is None


@pytest.mark.parametrize(
    ("tokens", "text", "pieces"),
    [
        (["a", " cat"], "a cat", ["a", " cat"]),
        ([" ", " a", "", "ä "], "a\u00e4", ["", "a", "", "ä"]),
        (["one", " two", " three"], "one t", ["one", " t"]),  # cut at the stop text "wo"
        (["one", "\n", "two"], "one", ["one"]),
        ([" ", ""], "", [""]),
        ([], "", []),
    ],
)
def test_log_probs_are_those_of_the_answers_tokens(client, backend, tokens, text, pieces):
    answers(backend, text=text, tokens=tokens, log_probs=[-1.5 * n for n in range(len(tokens))])
    (choice,) = client.post(CHAT, json={"messages": [TEXT_ONLY], "logprobs": True}).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == pieces and "".join(pieces) == text
    assert [entry["logprob"] for entry in content] == [-1.5 * n for n in range(len(pieces))]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_top_log_probs_are_those_of_each_place(client, backend):
    top = [[("a", -0.5), ("</s>", -1.5)], [(" cat", -0.25), ("ä", -float("inf"))]]
    answers(backend, text="a cat", tokens=["a", " cat"], log_probs=[-0.5, -0.25], top_tokens=top)
    body = {"messages": [TEXT_ONLY], "logprobs": True, "top_logprobs": 2}
    content = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert [[entry["token"] for entry in one["top_logprobs"]] for one in content] == [["a", "</s>"], [" cat", "ä"]]
    assert content[1]["top_logprobs"][1] == {"token": "ä", "logprob": -9999, "bytes": [195, 164]}


def test_top_log_probs_are_asked_of_the_model(client, backend):
    for most in (None, 0, 20):
        assert client.post(CHAT, json={"messages": [TEXT_ONLY], "logprobs": True, "top_logprobs": most}).is_success
        assert backend.calls[-1][1][0].sampling.top_log_probs == (most or 0)


def test_log_probs_are_numbers_of_json_and_none_where_a_decoder_answers(client, backend):
    answers(backend, text="a", tokens=["a"], log_probs=[-float("inf")])
    body = {"messages": [TEXT_ONLY], "logprobs": True}
    assert client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999
    answers(backend, route="[DET]")
    assert client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"] == []


@pytest.fixture
def sampling(backend, settings):
    """Posts parameters to a server that samples; returns the request's sampling, or the error."""
    served = TestClient(create_api(backend, settings.model_copy(update={"openai_sampling": True})))

    def post(**parameters):
        response = served.post(CHAT, json={"messages": [TEXT_ONLY], **parameters})
        return backend.calls[-1][1][0].sampling if response.status_code == 200 else response.json()["error"]

    return post


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0, "top_p": 1, "stop": None, "top_k": -1, "seed": 5}, GREEDY),
        ({"temperature": 0.7, "seed": 5}, Sampling(temperature=0.7, seed=5)),
        ({"temperature": 2, "top_p": 0.5, "top_k": 9, "seed": 0}, Sampling(2, 0.5, 9)),
        ({"temperature": 1, "top_k": -1, "seed": -3}, Sampling(1, seed=2**63 - 3)),
        ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
        ({"stop": "x"}, Sampling(stop=("x",))),
        ({"stop": ["x", "\n"]}, Sampling(stop=("x", "\n"))),
        ({"stop": []}, GREEDY),
    ],
)
def test_sampling_follows_the_parameters(sampling, parameters, expected):
    assert sampling(**parameters) == expected


def test_several_answers_are_drawn_with_seeds_of_their_own(backend, settings):
    served = TestClient(create_api(backend, settings.model_copy(update={"openai_sampling": True})))
    drawn = {"temperature": 1, "n": 3, "logprobs": True}
    body = served.post(CHAT, json={"messages": [message("what ?")], "seed": 5, **drawn}).json()
    ((_, requests, _),) = backend.calls
    assert [request.sampling.seed for request in requests] == [5, 6, 7]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"chat says what ?"}
    assert all(choice["lumen"]["text"] for choice in body["choices"]) and body["lumen"]["text"]
    served.post(CHAT, json={"messages": [message("what ?")], **drawn})
    assert len({request.sampling.seed for request in backend.calls[1][1]}) == 3


def test_several_greedy_answers_are_one(client, backend):
    answers(backend, text="a", usage=TokenUsage(70, 3))
    body = client.post(CHAT, json={"messages": [TEXT_ONLY], "n": 3}).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a"] * 3
    assert body["usage"] == {"prompt_tokens": 70, "completion_tokens": 3, "total_tokens": 73}


def test_the_prompt_of_several_answers_counts_once(backend, settings):
    served = TestClient(create_api(backend, settings.model_copy(update={"openai_sampling": True})))

    async def infer(image, requests, max_new_tokens):
        return [Answer("chat", (8, 8), text="a", usage=TokenUsage(70, 3)) for _ in requests]

    backend.infer = infer
    usage = served.post(CHAT, json={"messages": [TEXT_ONLY], "n": 3, "temperature": 1}).json()["usage"]
    assert usage == {"prompt_tokens": 70, "completion_tokens": 9, "total_tokens": 79}


def test_without_a_seed_each_answer_is_drawn_anew(sampling):
    assert len({sampling(temperature=1).seed for _ in range(8)}) == 8


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [-0.1, 2.1, "warm"],
        "top_p": [-0.1, 1.1],
        "top_k": [-2, 1.5],
        "repetition_penalty": [0, 11],
        "stop": ["", ["x"] * 17, [""], 5, [5], {"x": "y"}],
        "seed": ["x", 1.5],
    }.items(),
)
def test_sampling_out_of_range_is_refused_by_its_name(sampling, name, values):
    for value in values:
        error = sampling(**{name: value})
        assert error["reason"] in ("invalid_request", "invalid_sampling") and f"'{name}" in error["message"]


TEXT_ONLY = {"role": "user", "content": "hello"}
REFUSED = {
    "n": ({"messages": [message()], "n": 9}, 400, "too_many_choices"),
    "n in a stream": ({"messages": [message()], "n": 2, "stream": True}, 400, "unsupported_parameter"),
    "temperature": ({"messages": [message()], "temperature": 0.7}, 400, "unsupported_parameter"),
    "model": ({"messages": [message()], "model": "gpt"}, 404, "unknown_model"),
    "answer last": ({"messages": [message(), {"role": "assistant", "content": "x"}]}, 400, "unsupported_conversation"),
    "two questions": ({"messages": [message(), TEXT_ONLY]}, 400, "unsupported_conversation"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}, message()]}, 400, "invalid_request"),
    "nine images": (
        {"messages": [message(), *[{"role": "assistant", "content": "x"}, message()] * 8]},
        400,
        "too_many_images",
    ),
    "reserved text": (
        {"messages": [{"role": "system", "content": "<region>"}, message()]},
        400,
        "reserved_text",
    ),
    "long question": ({"messages": [message(text="x" * 101)]}, 400, "text_too_long"),
    "tool": ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, 400, "unsupported_conversation"),
    "calls": (
        {"messages": [message(), {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
        400,
        "invalid_request",
    ),
    "no content": ({"messages": [{"role": "user"}]}, 400, "missing_content"),
    "undocumented": ({"messages": [message()], "best_of": 1}, 400, "invalid_request"),
    "no messages": ({"messages": []}, 400, "invalid_request"),
    "remote image": ({"messages": [message(image="https://example.org/a.png")]}, 400, "remote_image_refused"),
    "no text": ({"messages": [message(text=" ")]}, 400, "empty_text"),
}


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(client, backend, body, status, reason):
    response = client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["reason"]) == (status, reason), response.text
    assert backend.calls == []


def test_a_long_conversation_is_refused_before_it_is_read(settings):
    few = settings.model_copy(update={"limits": settings.limits.model_copy(update={"max_messages": 2})})
    response = TestClient(create_api(FakeBackend(), few)).post(CHAT, json={"messages": [message(), None, None]})
    error = response.json()["error"]
    assert (response.status_code, error["reason"], error["param"]) == (400, "too_many_messages", "messages")


def test_model_may_name_its_version(client):
    body = {"messages": [message()], "model": f"{INFO['preset']}@{INFO['version']}"}
    assert client.post(CHAT, json=body).status_code == 200


#: parameter -> values that change nothing, values that are refused
PARAMETERS = {
    "temperature": ([None, 0, 0.0], [0.7, 1]),
    "top_p": ([None, 1, 1.0], [0.5, 0]),
    "n": ([None, 1, 1.0, 3], [0, -1, 9, "x"]),
    "frequency_penalty": ([None, 0, 0.0], [1, -0.5]),
    "presence_penalty": ([None, 0, 0.0], [1, -0.5]),
    "logit_bias": ([None, {}], [{"50": 10}, []]),
    "logprobs": ([None, False, True], ["x"]),
    "top_logprobs": ([None, 0], [5, 21, -1]),  # without logprobs
    "stop": ([None, []], ["x", ["x"], 5]),
    "top_k": ([None, 0, -1], [1, 50, -2]),
    "repetition_penalty": ([None, 1, 1.0], [1.2, 0]),
    "stream": ([None, False, True], ["x", 5]),
    "stream_options": ([None], [{"include_usage": True}, {"other": True}, 5]),  # without stream
    "response_format": ([None, {"type": "text"}], [{"type": "json_object"}, {"type": "json_schema"}, "text"]),
    "modalities": ([None, ["text"]], [["text", "audio"]]),
    "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
    "tools": ([None, []], [[{"type": "function"}], [{"type": "custom", "custom": {"name": "x"}}], {}]),
    "functions": ([None, []], [[{"name": "f"}]]),
    "tool_choice": ([None, "none", "auto"], ["required", {"type": "function"}]),
    "function_call": ([None, "none", "auto"], [{"name": "f"}]),
    "prediction": ([None], [{"type": "content", "content": "x"}]),
    "reasoning_effort": ([None, "none"], ["low", "high"]),
    "verbosity": ([None, "medium"], ["low", "high"]),
    "web_search_options": ([None], [{}]),
    "moderation": ([None], [{"model": "omni-moderation-latest"}]),
    "store": ([None, False], [True]),
    "service_tier": ([None, "auto", "default"], ["flex", "priority"]),
    "seed": ([None, 0, -3], ["x"]),
    "parallel_tool_calls": ([None, True, False], ["x"]),
    "metadata": ([None, {}, {"run": "7"}], [{"run": 7}, {"run": {}}, "x"]),
    "prompt_cache_key": ([None, "key"], [5]),
    "prompt_cache_retention": ([None, "24h"], [5]),
    "prompt_cache_options": ([None, {"mode": "implicit"}], ["x"]),
    "safety_identifier": ([None, "someone"], [5]),
    "user": ([None, "someone"], [5]),
    "max_tokens": ([None, 1, 4096], [0, -1, "x"]),
    "max_completion_tokens": ([None, 1, 2048], [0, -1, "x"]),
}


def test_every_parameter_has_a_case():
    assert set(PARAMETERS) == set(ChatRequest.model_fields) - {"model", "messages"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (taken, _) in PARAMETERS.items() for value in taken]
)
def test_a_neutral_value_is_taken(client, backend, name, value):
    response = client.post(CHAT, json={"messages": [message()], name: value})
    assert response.status_code == 200, response.text
    (request,) = backend.calls[0][1]
    assert request.text == "find every red circle"


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, refused) in PARAMETERS.items() for value in refused]
)
def test_another_value_is_refused_by_its_name(client, backend, name, value):
    response = client.post(CHAT, json={"messages": [message()], name: value})
    sentence = response.json()["error"]["message"]
    assert response.status_code == 400 and f"'{name}" in sentence and "\n" not in sentence
    assert backend.calls == []


def test_a_refusal_says_why_and_what_to_do(client):
    greedy = "decoding is greedy (the server's setting 'openai_sampling' is off)"
    for name, value, sentence in [
        ("temperature", 0.7, f"{greedy}; leave 'temperature' out or set it to 0"),
        (
            "stream_options",
            {"include_usage": True},
            "'stream_options' needs 'stream': true; set it, or leave the options out",
        ),
        (
            "tool_choice",
            "required",
            "'tool_choice' needs 'tools'; list them, see GET /v1/tools",
        ),
        ("audio", {}, "answers are plain text; leave 'audio' out"),
    ]:
        response = client.post(CHAT, json={"messages": [message()], name: value})
        assert response.json()["error"]["message"] == sentence


def test_every_parameter_is_documented(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    parameters = schemas["ChatRequest"]["properties"]
    assert all(parameter["description"] for parameter in parameters.values())
    assert parameters["store"]["enum"] == [None, False] and "not stored" in parameters["store"]["description"]
    assert "openai_sampling" in parameters["top_p"]["description"]
    assert {"type": "string"} in parameters["stop"]["anyOf"]
    assert {"type": "string"} in schemas["ChatMessage"]["properties"]["content"]["anyOf"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_servers_bound_caps_the_clients(client, backend, name):
    for asked, given in [(7, 7), (MAX_NEW_TOKENS, MAX_NEW_TOKENS), (10**6, MAX_NEW_TOKENS)]:
        assert client.post(CHAT, json={"messages": [message()], name: asked}).status_code == 200
        assert backend.calls[-1][2] == given


def test_empty_keys_of_a_message_are_taken(client):
    empty = {"refusal": None, "audio": None, "tool_calls": None, "function_call": None, "annotations": [], "name": "me"}
    for keys in (empty, {"tool_calls": [], "annotations": None, "refusal": "", "name": None}):
        response = client.post(CHAT, json={"messages": [message() | keys]})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("key", ["refusal", "audio", "tool_calls", "function_call", "annotations"])
def test_a_filled_key_of_a_message_is_refused_by_its_name(client, key):
    value = [{"id": "a", "type": "function", "function": {"name": "detect", "arguments": "{}"}}]
    response = client.post(CHAT, json={"messages": [message() | {key: value}]})
    assert response.status_code == 400 and f"'messages.0.{key}'" in response.json()["error"]["message"]


URL = "data:image/png;base64," + base64_png()
TEXT = {"type": "text", "text": "what is it ?"}
IMAGE = {"type": "image_url", "image_url": {"url": URL}}


def ask(client, *parts):
    return client.post(CHAT, json={"messages": [{"role": "user", "content": [TEXT, *parts]}]})


@pytest.mark.parametrize(
    "part",
    [
        *({**IMAGE, "image_url": {"url": URL, "detail": detail}} for detail in ("auto", "low", "high", None)),
        {**IMAGE, "image_url": URL},
        {**IMAGE, "image_url": base64_png()},
        {**IMAGE, "text": None, "prompt_cache_breakpoint": {"mode": "explicit"}},
    ],
)
def test_image_parts(client, backend, part):
    assert ask(client, part).status_code == 200
    image, (request,), _ = backend.calls[0]
    assert image.shape == (16, 20, 3) and request.text == "what is it ?"


#: a wrong part -> the field and the words that its error names
WRONG_PARTS = {
    "other type": ({"type": "input_image", "image_url": URL}, "1.type", "'text' or 'image_url'"),
    "image": ({"type": "image", "image": base64_png()}, "1.type", "'text' or 'image_url'"),
    "no type": ({"image_url": {"url": URL}}, "1.type", "is required"),
    "type of no text": ({"type": 1}, "1.type", "'text' or 'image_url'"),
    "detail a number": ({**IMAGE, "image_url": {"url": URL, "detail": 1}}, "1.image_url.detail", "'auto', 'low'"),
    "other detail": ({**IMAGE, "image_url": {"url": URL, "detail": "fine"}}, "1.image_url.detail", "not 'fine'"),
    "detail an image": ({**IMAGE, "image_url": {"url": URL, "detail": URL}}, "1.image_url.detail", "characters"),
    "no image_url": ({"type": "image_url"}, "1.image_url", "needs this field"),
    "null image_url": ({"type": "image_url", "image_url": None}, "1.image_url", "needs this field"),
    "image_url a number": ({"type": "image_url", "image_url": 1}, "1.image_url", "'url'"),
    "image_url a list": ({"type": "image_url", "image_url": [URL]}, "1.image_url", "'url'"),
    "no url": ({"type": "image_url", "image_url": {}}, "1.image_url.url", "is required"),
    "url a number": ({"type": "image_url", "image_url": {"url": 1}}, "1.image_url.url", "a text, not a number"),
    "nested url": ({"type": "image_url", "image_url": {"url": {"url": URL}}}, "1.image_url.url", "not an object"),
    "empty url": ({"type": "image_url", "image_url": ""}, "1.image_url.url", "is empty"),
    "no base64": ({"type": "image_url", "image_url": {"url": "%%%"}}, "1.image_url.url", "base64"),
    "key in image_url": ({**IMAGE, "image_url": {"url": URL, "detial": "low"}}, "1.image_url.detial", "mean 'detail'"),
    "key in part": ({**IMAGE, "cache_control": {"type": "ephemeral"}}, "1.cache_control", "valid keys: image_url"),
    "no text": ({"type": "text"}, "1.text", "needs this field"),
    "text a number": ({"type": "text", "text": 1}, "1.text", "a text, not a number"),
    "text and image": ({**TEXT, "image_url": URL}, "1.image_url", "does not take this field"),
    "part a text": (URL, "1", "an object, not a text"),
}


@pytest.mark.parametrize(("part", "field", "words"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_a_wrong_part_is_told_by_its_field(client, backend, part, field, words):
    response = ask(client, part)
    sentence = response.json()["error"]["message"]
    assert response.status_code == 400 and f"messages.0.content.{field}" in sentence and words in sentence, sentence
    assert "iVBOR" not in sentence and backend.calls == []


@pytest.mark.parametrize("content", [5, {"type": "text"}, True])
def test_content_of_another_kind(client, content):
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    sentence = response.json()["error"]["message"]
    assert response.status_code == 400 and "messages.0.content" in sentence and "list of parts" in sentence


def test_the_tokens_of_an_answer_are_counted(client, backend):
    answers(backend, text="a", usage=TokenUsage(70, 3))
    usage = client.post(CHAT, json={"messages": [TEXT_ONLY]}).json()["usage"]
    assert usage == {"prompt_tokens": 70, "completion_tokens": 3, "total_tokens": 73}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": [TEXT_ONLY], "n": 9}, "n", "too_many_choices"),
        ({"messages": [TEXT_ONLY], "temperature": 1}, "temperature", "unsupported_parameter"),
        ({"messages": [TEXT_ONLY], "model": "gpt"}, "model", "unknown_model"),
        ({"messages": [TEXT_ONLY], "max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"messages": [TEXT_ONLY], "tempo": 0}, "tempo", "invalid_request"),
        ({"messages": [{**TEXT_ONLY, "role": "assistant"}]}, "messages.0", "unsupported_conversation"),
        ({"messages": [{**TEXT_ONLY, "content": ""}]}, "messages.0.content", "empty_text"),
    ],
)
def test_errors_have_openais_fields(client, body, param, code):
    error = client.post(CHAT, json=body).json()["error"]
    assert (error["param"], error["code"], error["reason"]) == (param, code, code), error
    assert error["type"] == "invalid_request_error" and error["message"] and error["request_id"]


def test_errors_of_the_server_have_their_type(client, backend):
    backend.error = Unavailable("a replica died")
    error = client.post(CHAT, json={"messages": [TEXT_ONLY]}).json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "unavailable")


def test_openais_client_reads_answers_and_errors(client, backend):
    openai = pytest.importorskip("openai")
    chat = openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client, max_retries=0).chat
    answers(backend, text="a", is_cut=True, usage=TokenUsage(70, 3))
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "temperature": 0, "top_p": 1}
    completion = chat.completions.create(model="nano", messages=[TEXT_ONLY], max_tokens=3, **neutral)
    assert completion.choices[0].finish_reason == "length" and completion.usage.total_tokens == 73
    with pytest.raises(openai.BadRequestError) as caught:
        chat.completions.create(model="nano", messages=[TEXT_ONLY], presence_penalty=1)
    error = caught.value
    assert (error.param, error.code, error.type) == (
        "presence_penalty",
        "unsupported_parameter",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError):
        chat.completions.create(model="gpt", messages=[TEXT_ONLY])
    backend_error = Overloaded("full", 3)

    async def full(image, requests, max_new_tokens):
        raise backend_error

    backend.infer = full
    with pytest.raises(openai.InternalServerError) as caught:
        chat.completions.create(model="nano", messages=[TEXT_ONLY])
    assert caught.value.response.headers["retry-after"] == "3"
