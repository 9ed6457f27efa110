"""Which version of the model an answer names, and that a request which names one is answered by no other."""

from __future__ import annotations

import dataclasses
import json

import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.serve.api import create_api
from lumen_ray.serve.job import pinned
from lumen_ray.serve.settings import ServeSettings

MESSAGES = {"messages": [{"role": "user", "content": "hello"}]}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
IMAGE = {"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [base64_png()]}


class Changing(FakeBackend):
    """A server that goes over to version new456 while it answers. `named`: the version that each request asked for."""

    def __init__(self):
        super().__init__()
        self.named: list[str] = []

    async def infer(self, *asked):
        self.named.append(pinned.get())
        return [dataclasses.replace(answer, model="nano@new456") for answer in await super().infer(*asked)]


@pytest.fixture(scope="module")
def changing() -> Changing:
    return Changing()


@pytest.fixture(scope="module")
def server(changing) -> TestClient:
    return TestClient(create_api(changing, ServeSettings(model="unused")))


ASKED = {
    "task": ("/v1/chat", {"text": "hello"}),
    "several images": ("/v1/infer", {"images": [base64_png()], "requests": [{"task": "caption"}]}),
    "chat": (CHAT, MESSAGES),
    "responses": (RESPONSES, {"input": "hello"}),
    "roboflow": ("/infer/lmm", {"image": {"type": "base64", "value": base64_png()}}),
}


@pytest.mark.parametrize(("path", "body"), ASKED.values(), ids=ASKED)
def test_an_answer_names_the_version_that_gave_it(server, path, body):
    assert server.post(path, json=body).json()["model"] == "nano@new456"


def test_the_open_inference_protocol_names_it(server):
    assert server.post("/v2/models/nano/infer", json={"inputs": [IMAGE]}).json()["model_version"] == "new456"


@pytest.mark.parametrize(("path", "body"), [ASKED["chat"], ASKED["responses"]], ids=["chat", "responses"])
def test_the_last_event_of_a_stream_names_it(server, path, body):
    lines = server.post(path, json={**body, "stream": True}).text.splitlines()
    last = json.loads([line for line in lines if line.startswith("data: {")][-1].removeprefix("data: "))
    assert last.get("response", last)["model"] == "nano@new456" and "model" not in last.get("response", last)["lumen"]


def test_a_version_that_is_named_goes_with_the_request(server, changing):
    changing.named.clear()
    for model in ("nano@abc123", "nano", None):
        assert server.post(CHAT, json={**MESSAGES, "model": model}).status_code == 200
    server.post("/v2/models/nano/versions/abc123/infer", json={"inputs": [IMAGE]})
    assert changing.named == ["abc123", "", "", "abc123"]
    assert server.post(CHAT, json={**MESSAGES, "model": "nano@new456"}).status_code == 404
