"""Pictures in OpenAI's format: supported fields, and that all others are taken at their neutral value only."""

from __future__ import annotations

import base64
import json

import pytest
from support.serve_fakes import png

from lumen_ray.answer import decode_png
from lumen_ray.serve.openai_images import ImageRequest

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
    "quality": ({"prompt": "x", "quality": "hd"}, 400, "unsupported_parameter"),
    "undocumented": ({"prompt": "x", "steps": 5}, 400, "invalid_request"),
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
        (client.post(EDIT, files={"image": png(), "markup": png()}, data=prompt), 400, "unsupported_parameter"),
        (client.post(EDIT, files={"image": b"nothing"}, data=prompt), 400, "broken_image"),
    )
    for response, status, reason in cases:
        assert (response.status_code, response.json()["error"]["reason"]) == (status, reason), response.text
    assert backend.calls == []


#: parameter -> values that change nothing, values that are refused
PARAMETERS = {
    "background": ([None, "auto"], ["transparent", "opaque"]),
    "moderation": ([None, "auto", "low"], ["high"]),
    "quality": ([None, "auto", "standard"], ["high", "hd"]),
    "style": ([None], ["vivid", "natural"]),
    "complexity": ([None], ["high"]),
    "output_compression": ([None, 100, 100.0], [50, 0]),
    "partial_images": ([None, 0], [2]),
    "stream": ([None, False], [True]),
    "frame_count": ([None], [9]),
    "frame_duration_ms": ([None], [200]),
    "svg": ([None], [{"model": "x"}]),
    "input_fidelity": ([None, "low"], ["high"]),
    "output_format": ([None, "png"], ["webp"]),
    "response_format": ([None, "b64_json"], ["url"]),
    "user": ([None, "someone"], []),
    "safety_identifier": ([None, "someone"], []),
    "n": ([None, 1, 3], [0, 1.5]),
    "seed": ([None, 5], [-1]),
    "size": ([None, "auto", "16x16"], ["16"]),
}


def in_form(value):
    """A value as an HTML form or OpenAI's client writes it."""
    return "" if value is None else json.dumps(value).strip('"')


def test_every_parameter_has_a_case():
    assert set(PARAMETERS) == set(ImageRequest.model_fields) - {"prompt", "model"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (taken, _) in PARAMETERS.items() for value in taken]
)
def test_a_neutral_value_is_taken(client, name, value):
    for response in (
        client.post(MAKE, json={"prompt": "x", name: value}),
        client.post(EDIT, files={"image": png()}, data={"prompt": "x", name: in_form(value)}),
    ):
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, refused) in PARAMETERS.items() for value in refused]
)
def test_another_value_is_refused_by_its_name(client, backend, name, value):
    for response in (
        client.post(MAKE, json={"prompt": "x", name: value}),
        client.post(EDIT, files={"image": png()}, data={"prompt": "x", name: in_form(value)}),
    ):
        sentence = response.json()["error"]["message"]
        assert response.status_code == 400 and name in sentence and "\n" not in sentence, sentence
    assert backend.calls == []


def test_inputs_that_a_browser_left_empty_are_as_if_left_out(client):
    files = [("image", ("x.png", png())), ("mask", ("", b""))]
    response = client.post(EDIT, files=files, data={"prompt": "x", "size": "", "mask": "", "n": ""})
    assert response.status_code == 200, response.text
    response = client.post(EDIT, files={"image": png()}, data={"prompt": ""})
    assert response.status_code == 400 and "'prompt' is required" in response.json()["error"]["message"]


def test_every_parameter_is_documented(client):
    document = client.get("/openapi.json").json()
    form = document["paths"][EDIT]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    for schema in (document["components"]["schemas"]["ImageRequest"], form):
        assert all(parameter["description"] for parameter in schema["properties"].values())
