"""No body is the server's fault, on any route. `LUMEN_MALFORMED` is the number of bodies (300); with 10,000 the memory
of the process is looked at too."""

from __future__ import annotations

import json
import os
import random

import psutil
import pytest
from fastapi.testclient import TestClient
from support.malformed import malformed
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings

NUMBER = int(os.environ.get("LUMEN_MALFORMED", 300))
IMAGE = base64_png()
USER = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": IMAGE}}]}
CALL = {"id": "1", "type": "function", "function": {"name": "detect", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "detect", "parameters": {"type": "object"}}}
CHAT = {
    "model": "nano",
    "messages": [{"role": "system", "content": "be brief"}, USER],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "detect"}},
    "max_tokens": 4,
    "stream_options": None,
}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions#results": {
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]
        + [{"role": "tool", "tool_call_id": "1", "content": "a"}],
        "response_format": {"type": "text"},
        "logprobs": True,
        "n": 2,
    },
    "/v1/chat/completions#stream": {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}},
    "/v1/responses": {
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": IMAGE}],
            },
            {"type": "function_call", "call_id": "1", "name": "detect", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "a"},
        ],
        "instructions": "be brief",
        "tools": [{"type": "function", "name": "detect"}],
        "text": {"format": {"type": "text"}},
        "metadata": {"a": "b"},
    },
    "/v1/responses#stream": {"input": "a", "stream": True, "max_output_tokens": 3, "include": []},
    "/v1/batches": {
        "input_file_id": "file-0",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    },
    "/v1/batches/batch_0/cancel": {},
    "/v1/files": {"purpose": "batch"},
    "/v1/images/generations": {"prompt": "a", "n": 2, "size": "8x8", "output_format": "png"},
    "/v1/images/edits": {"prompt": "a"},
    "/v1/infer": {"image": IMAGE, "requests": [{"task": "detect", "classes": ["a"]}, {"task": "caption"}]},
    "/v1/infer#images": {"images": [IMAGE, IMAGE], "requests": [{"task": "vqa", "text": "a"}]},
    "/v1/detect": {
        "image": IMAGE,
        "classes": ["a", {"name": "b", "examples": [{"box": [1, 1, 8, 8], "positive": True, "image": IMAGE}]}],
        "score_threshold": 0.1,
    },
    "/v1/pose": {"image": IMAGE, "classes": ["a"], "keypoints": ["b"]},
    "/v1/region_caption": {"image": IMAGE, "region": {"kind": "box", "points": [[1, 2], [8, 9]]}},
    "/v1/region_segment": {
        "image": IMAGE,
        "region": {"kind": "mask", "mask": {"size": [16, 20], "counts": [0, 5, 315]}},
    },
    "/v1/chat": {"text": "a", "history": [["b", "c"]], "system": "d", "temperature": 0.5, "stop": ["e"], "seed": 1},
    "/v1/generate": {"text": "a", "height": 8, "width": 8, "steps": 2, "num_images": 1},
    "/v1/edit": {"image": IMAGE, "text": "a", "image_guidance": 2},
    "/hf/image-segmentation": {"inputs": IMAGE, "parameters": {"subtask": "semantic", "candidate_labels": ["a"]}},
    "/infer/object_detection": {"image": {"type": "base64", "value": IMAGE}, "class_filter": ["a"]},
    "/sam3/concept_segment": {
        "image": {"type": "base64", "value": IMAGE},
        "prompts": [{"type": "text", "text": "a"}],
    },
    "/v2/models/nano/infer": {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [IMAGE]}]},
}
KINDS = ("application/json", "application/json", "application/json", "multipart/form-data; boundary=x", "text/plain")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> TestClient:
    folder = str(tmp_path_factory.mktemp("batches"))
    settings = ServeSettings(model="unused", batches={"folder": folder}, openai_sampling=True)
    return TestClient(create_api(FakeBackend(), settings), raise_server_exceptions=False)


def test_the_bodies_are_right_before_they_are_spoilt(server):
    for route, body in BODIES.items():
        response = server.post(route.partition("#")[0], json=body)
        # there is no such file or batch, and files come in forms
        expected = (404, 415) if route.startswith(("/v1/batches", "/v1/files", "/v1/images/edits")) else (200,)
        assert response.status_code in expected, (route, response.text)


def test_malformed_bodies_are_no_fault_of_the_server(server):
    rng, statuses = random.Random(7), []
    process, before = psutil.Process(), 0
    for number in range(NUMBER):
        if number == NUMBER // 5:
            before = process.memory_info().rss
        route = rng.choice(list(BODIES))
        body = malformed(BODIES[route], rng)
        response = server.post(route.partition("#")[0], content=body, headers={"content-type": rng.choice(KINDS)})
        assert response.status_code < 500, (route, body[:2000], response.text[:500])
        assert "Traceback" not in response.text
        if response.status_code >= 400:
            assert json.loads(response.text)
        elif "text/event-stream" in response.headers["content-type"]:
            assert '"internal_error"' not in response.text, (route, body[:2000], response.text[-500:])
        statuses.append(response.status_code)
    assert server.get("/healthz").status_code == server.get("/readyz").status_code == 200
    assert server.post("/v1/caption", json={"image": IMAGE}).status_code == 200
    assert 0 < statuses.count(200) < NUMBER / 2, "some mistakes do not matter, most do"
    if NUMBER >= 10_000:
        after = process.memory_info().rss
        print(f"{NUMBER} bodies: {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB")
        assert after < 1.05 * before
