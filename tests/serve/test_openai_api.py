"""Chat completions: what is honoured, and that the rest is taken at its neutral value only."""

from __future__ import annotations

import json

import pytest
from support.serve_fakes import INFO, base64_png

from lumen_ray.serve.openai_api import ChatRequest
from lumen_ray.serve.settings import MAX_NEW_TOKENS
from lumen_ray.structures import Answer, Boxes, Prediction

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
        boxes = Boxes([[1, 2, 3, 4]], image.shape[:2])
        return [Answer("chat", image.shape[:2], [Prediction("red circle", boxes, [0.8])], route="[DET]")]

    backend.infer = infer
    result = client.post(CHAT, json={"messages": [message()]}).json()
    assert result["choices"][0]["message"]["content"] == ""
    assert result["lumen"]["route"] == "[DET]" and result["lumen"]["instances"][0]["box"] == [1, 2, 3, 4]


TEXT_ONLY = {"role": "user", "content": "hello"}
REFUSED = {
    "stream": ({"messages": [message()], "stream": True}, 400, "streaming_unsupported"),
    "n": ({"messages": [message()], "n": 2}, 400, "unsupported_parameter"),
    "temperature": ({"messages": [message()], "temperature": 0.7}, 400, "unsupported_parameter"),
    "model": ({"messages": [message()], "model": "gpt"}, 404, "unknown_model"),
    "history": ({"messages": [message(), {"role": "assistant", "content": "x"}]}, 400, "unsupported_conversation"),
    "system": ({"messages": [{"role": "system", "content": "x"}, message()]}, 400, "unsupported_conversation"),
    "tool": ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, 400, "unsupported_conversation"),
    "calls": (
        {"messages": [message(), {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
        400,
        "unsupported_conversation",
    ),
    "no content": ({"messages": [{"role": "user"}]}, 400, "missing_content"),
    "undocumented": ({"messages": [message()], "best_of": 1}, 400, "invalid_request"),
    "no messages": ({"messages": []}, 400, "invalid_request"),
    "no image": ({"messages": [TEXT_ONLY]}, 400, "missing_image"),
    "remote image": ({"messages": [message(image="https://example.org/a.png")]}, 400, "remote_image_refused"),
    "no text": ({"messages": [message(text=" ")]}, 400, "empty_text"),
}


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(client, backend, body, status, reason):
    response = client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["reason"]) == (status, reason), response.text
    assert backend.calls == []


def test_half_a_surrogate_pair_is_an_error_like_another(client):
    body = json.dumps({"messages": [message()], "model": "\ud800"})
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["reason"]) == (404, "unknown_model")


def test_model_may_name_its_version(client):
    body = {"messages": [message()], "model": f"{INFO['preset']}@{INFO['version']}"}
    assert client.post(CHAT, json=body).status_code == 200


#: parameter -> values that change nothing, values that are refused
PARAMETERS = {
    "temperature": ([None, 0, 0.0], [0.7, 1]),
    "top_p": ([None, 1, 1.0], [0.5, 0]),
    "n": ([None, 1, 1.0], [0, 2]),
    "frequency_penalty": ([None, 0, 0.0], [1, -0.5]),
    "presence_penalty": ([None, 0, 0.0], [1, -0.5]),
    "logit_bias": ([None, {}], [{"50": 10}, []]),
    "logprobs": ([None, False], [True]),
    "top_logprobs": ([None, 0], [5]),
    "stop": ([None, []], ["x", ["x"]]),
    "stream": ([None, False], [True]),
    "stream_options": ([None], [{"include_usage": True}]),
    "response_format": ([None, {"type": "text"}], [{"type": "json_object"}, {"type": "json_schema"}]),
    "modalities": ([None, ["text"]], [["text", "audio"]]),
    "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
    "tools": ([None, []], [[{"type": "function"}]]),
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
    for name, value, sentence in [
        ("temperature", 0.7, "decoding is greedy; leave 'temperature' out or set it to 0"),
        ("stream", True, "answers are not streamed; leave 'stream' out or set it to false"),
        (
            "tool_choice",
            "required",
            'the model calls no tools; leave \'tool_choice\' out or set it to "none" or "auto"',
        ),
        ("audio", {}, "answers are plain text; leave 'audio' out"),
    ]:
        response = client.post(CHAT, json={"messages": [message()], name: value})
        assert response.json()["error"]["message"] == sentence


def test_every_parameter_is_documented(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    parameters = schemas["ChatRequest"]["properties"]
    assert all(parameter["description"] for parameter in parameters.values())
    assert parameters["top_p"]["enum"] == [None, 1] and "greedy" in parameters["top_p"]["description"]
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
    response = client.post(CHAT, json={"messages": [message() | {key: [{"id": "a"}]}]})
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
