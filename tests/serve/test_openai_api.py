"""Chat completions: what is honoured, and that the rest is refused instead of ignored."""

from __future__ import annotations

import pytest
from support.serve_fakes import INFO, base64_png

from lumen_ray.structures import Answer, Boxes, Prediction


def message(text="find every red circle", image=None):
    url = {"url": image or "data:image/png;base64," + base64_png()}
    return {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]}


def test_text_answer(client, backend):
    body = {"model": "nano", "messages": [message("what is it ?")], "max_tokens": 7, "temperature": 0, "stream": False}
    result = client.post("/v1/chat/completions", json=body).json()
    assert result["object"] == "chat.completion" and result["model"] == "nano@abc123"
    assert result["choices"][0]["message"] == {"role": "assistant", "content": "chat says what is it ?"}
    assert backend.calls[0][2] == 7


def test_routed_answer_carries_instances(client, backend):
    async def infer(image, queries, max_new_tokens):
        boxes = Boxes([[1, 2, 3, 4]], image.shape[:2])
        return [Answer("chat", image.shape[:2], [Prediction("red circle", boxes, [0.8])], route="[DET]")]

    backend.infer = infer
    result = client.post("/v1/chat/completions", json={"messages": [message()]}).json()
    assert result["choices"][0]["message"]["content"] == ""
    assert result["lumen"]["route"] == "[DET]" and result["lumen"]["instances"][0]["box"] == [1, 2, 3, 4]


TEXT_ONLY = {"role": "user", "content": "hello"}
REFUSED = {
    "stream": ({"messages": [message()], "stream": True}, 400, "streaming_unsupported"),
    "n": ({"messages": [message()], "n": 2}, 400, "unsupported_parameter"),
    "temperature": ({"messages": [message()], "temperature": 0.7}, 400, "unsupported_parameter"),
    "tools": ({"messages": [message()], "tools": []}, 400, "invalid_request"),
    "model": ({"messages": [message()], "model": "gpt"}, 404, "unknown_model"),
    "history": ({"messages": [message(), {"role": "assistant", "content": "x"}]}, 400, "unsupported_conversation"),
    "system": ({"messages": [{"role": "system", "content": "x"}, message()]}, 400, "unsupported_conversation"),
    "no messages": ({"messages": []}, 400, "invalid_request"),
    "no image": ({"messages": [TEXT_ONLY]}, 400, "missing_image"),
    "remote image": ({"messages": [message(image="https://example.org/a.png")]}, 400, "remote_image_refused"),
    "no text": ({"messages": [message(text=" ")]}, 400, "empty_text"),
}


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(client, backend, body, status, reason):
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["reason"]) == (status, reason), response.text
    assert backend.calls == []


def test_model_may_name_its_version(client):
    body = {"messages": [message()], "model": f"{INFO['preset']}@{INFO['version']}"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
