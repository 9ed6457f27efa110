"""OpenAI's client against a server on a local Ray, with a nano model of random weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.serve_fakes import base64_png, free_port

from lumen_ray.serve.app import run
from lumen_ray.serve.settings import Deployment, Http, ServeSettings, TrunkDeployment
from lumen_ray.wire.settings import Defaults

pytestmark = pytest.mark.ray
URL = "data:image/png;base64," + base64_png(128, 96)
TEXT = "find every red circle"
QUESTION = {
    "role": "user",
    "content": [{"type": "text", "text": TEXT}, {"type": "image_url", "image_url": {"url": URL}}],
}


@pytest.fixture(scope="module")
def openai_client(model_folder):
    openai = pytest.importorskip("openai", reason="needs openai")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    settings = ServeSettings(
        model=str(model_folder),
        http=Http(port=free_port()),
        openai_sampling=True,
        defaults=Defaults(score_threshold=0, max_per_phrase=3, max_new_tokens=8),
        ingress=Deployment(num_cpus=0.1),
        trunk=TrunkDeployment(num_cpus=0.5),
    )
    server = run(settings, blocking=False)
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client
    server.stop()


@pytest.fixture(scope="module")
def tools(openai_client):
    return openai_client.get("/tools", cast_to=object)["tools"]


def test_a_tool_is_called_and_its_result_read(openai_client, tools):
    assert {tool["function"]["name"] for tool in tools} == {"detect", "ground", "segment", "pose", "count"}
    chat = openai_client.chat.completions
    messages = [QUESTION]
    completion = chat.create(model="nano", messages=messages, tools=tools, tool_choice="required")
    (call,) = completion.choices[0].message.tool_calls
    (part,) = completion.lumen["parts"]
    assert completion.choices[0].finish_reason == "tool_calls" and part["tool_call_id"] == call.id
    assert "red circle" in call.function.arguments and len(part["instances"]) == 3
    assert completion.usage.completion_tokens == 1
    messages += [completion.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": json.dumps(part)}]
    answer = chat.create(model="nano", messages=messages, tools=tools).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", "red circle: 3 found")
    messages += [answer.message, {"role": "user", "content": "and the square ?"}]
    assert chat.create(model="nano", messages=messages).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("name", ["detect", "segment", "count"])
def test_a_named_tool_is_the_one_that_is_called(openai_client, tools, name):
    choice = {"type": "function", "function": {"name": name}}
    asked = {"model": "nano", "messages": [QUESTION], "tools": tools, "tool_choice": choice}
    whole = openai_client.chat.completions.create(**asked)
    with openai_client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion()
    for completion in (whole, streamed):
        (call,) = completion.choices[0].message.tool_calls
        assert call.function.name == name and json.loads(call.function.arguments) == {"classes": ["red circle"]}


def test_drawn_answers_differ_and_repeat_with_their_seed(openai_client):
    asked = {"model": "nano", "messages": [QUESTION], "n": 4, "temperature": 1.5, "seed": 3, "tool_choice": "none"}
    first, second = (openai_client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1 and texts == [choice.message.content for choice in second.choices]


def test_a_typed_result(openai_client):
    from pydantic import BaseModel

    class Count(BaseModel):
        counts: dict[str, int]

    completion = openai_client.chat.completions.parse(model="nano", messages=[QUESTION], response_format=Count)
    assert completion.choices[0].message.parsed == Count(counts={"red circle": 3})


def test_responses_whole_and_streamed(openai_client, tools):
    parts = [{"type": "input_text", "text": TEXT}, {"type": "input_image", "image_url": URL, "detail": "auto"}]
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    asked = {"model": "nano", "input": [{"role": "user", "content": parts}], "tools": flat, "store": False}
    called = openai_client.responses.create(**asked, tool_choice="required")
    (call,) = called.output
    assert call.type == "function_call" and called.usage.output_tokens == 1
    told = openai_client.responses.create(**asked, tool_choice="none", max_output_tokens=6)
    with openai_client.responses.stream(**asked, tool_choice="none", max_output_tokens=6) as stream:
        kinds = [event.type for event in stream]
    assert told.status in ("completed", "incomplete") and told.output[0].type == "message"
    assert kinds[0] == "response.created" and kinds[-1] == f"response.{told.status}"
