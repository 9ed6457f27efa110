"""Pictures in OpenAI's format: supported fields, and that all others are refused instead of ignored."""

from __future__ import annotations

import base64

import pytest
from support.serve_fakes import png

from lumen_ray.structures import decode_png

MAKE, EDIT = "/v1/images/generations", "/v1/images/edits"


def test_pictures_of_words(client, backend):
    body = {"model": "nano", "prompt": "a red circle .", "n": 2, "size": "24x16", "seed": 5}
    result = client.post(MAKE, json=body).json()
    pictures = [decode_png(base64.b64decode(entry["b64_json"])) for entry in result["data"]]
    assert [picture.shape for picture in pictures] == [(16, 24, 3)] * 2
    assert result["created"] > 1.7e9 and result["lumen"]["model"] == "nano@abc123"
    image, (asked,), _ = backend.calls[0]
    assert image is None and asked.task == "generate" and asked.text == "a red circle ."
    assert (asked.sample.seed, asked.sample.size) == (5, (16, 24))


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_a_picture_changed(client, backend, name):
    data = {"prompt": "make the circle blue", "size": "auto", "n": "1", "response_format": "b64_json"}
    result = client.post(EDIT, files={name: ("x.png", png())}, data=data).json()
    assert decode_png(base64.b64decode(result["data"][0]["b64_json"])).shape == (8, 8, 3)
    image, (asked,), _ = backend.calls[0]
    assert image.shape == (16, 20, 3) and asked.task == "edit" and asked.text == "make the circle blue"


REFUSED = {
    "no prompt": ({}, 400, "invalid_request"),
    "empty prompt": ({"prompt": " "}, 400, "empty_text"),
    "url": ({"prompt": "x", "response_format": "url"}, 400, "invalid_request"),
    "size": ({"prompt": "x", "size": "large"}, 400, "invalid_size"),
    "huge": ({"prompt": "x", "size": "99999x8"}, 400, "invalid_request"),
    "too many": ({"prompt": "x", "n": 11}, 400, "invalid_request"),
    "model": ({"prompt": "x", "model": "dall-e-3"}, 404, "unknown_model"),
    "quality": ({"prompt": "x", "quality": "hd"}, 400, "invalid_request"),
}


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(client, backend, body, status, reason):
    response = client.post(MAKE, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["reason"] == reason
    response = client.post(EDIT, files={"image": png()}, data={k: str(v) for k, v in body.items()})
    assert response.status_code == status, response.text
    assert backend.calls == []


def test_edits_want_one_picture_and_no_mask(client, backend):
    prompt = {"prompt": "make it blue"}
    cases = (
        (client.post(EDIT, json=prompt), 415, "unsupported_media_type"),
        (client.post(EDIT, files={"other": png()}, data=prompt), 400, "missing_image"),
        (client.post(EDIT, files=[("image[]", png()), ("image[]", png())], data=prompt), 400, "missing_image"),
        (client.post(EDIT, files={"image": png(), "mask": png()}, data=prompt), 400, "mask_unsupported"),
        (client.post(EDIT, files={"image": b"nothing"}, data=prompt), 400, "broken_image"),
    )
    for response, status, reason in cases:
        assert (response.status_code, response.json()["error"]["reason"]) == (status, reason), response.text
    assert backend.calls == []
