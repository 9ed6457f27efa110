"""No error repeats an image or another long value, wherever the caller put it."""

from __future__ import annotations

import base64
import textwrap

import numpy as np
import pytest
from support.serve_fakes import png

from lumen_ray.answer import encode_png
from lumen_ray.wire.errors import without_data

NOISE = base64.b64encode(encode_png(np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8))).decode()
WRAPPED = "\n".join(textwrap.wrap(NOISE, 76))
TEXT = {"type": "text", "text": "what is it ?"}


def bodies(image):
    """(route, JSON body) with an image of any shape where something else belongs."""
    yield "/v1/detect", {"image": image, "clases": ["a"]}
    yield "/v1/detect", {"image": {"data": image}, "classes": ["a"]}
    yield "/v1/detect", {"image": [image], "classes": ["a"]}
    yield "/v1/detect", {"image": NOISE, "classes": image}
    yield "/v1/detect", {"image": NOISE, "classes": [{"name": image}]}
    yield "/v1/detect", {"image": NOISE, "classes": ["a"], "score_threshold": image}
    yield "/v1/detect", {"image": NOISE, "classes": ["a"], f"{image}": 1}
    yield "/v1/detect", {"image": f"https://{image}", "classes": ["a"]}
    yield "/v1/region_caption", {"image": NOISE, "region": image}
    yield "/v1/region_caption", {"image": NOISE, "region": {"kind": f"{image}"}}
    yield "/v1/region_caption", {"image": NOISE, "region": {"kind": "mask", "mask": {"size": image, "counts": image}}}
    yield "/v1/region_caption", {"image": NOISE, "region": {"kind": "box", "points": image}}
    yield "/v1/infer", {"image": [image], "requests": [{"task": "caption"}]}
    yield "/v1/infer", {"image": NOISE, "requests": image}
    yield "/v1/infer", {"image": NOISE, "requests": [{"task": f"{image}"}]}
    yield "/v1/infer", {"image": NOISE, "requests": [{"task": "caption", "image": image}]}
    yield "/v1/generate", {"text": {"image": image}}
    yield "/v1/chat/completions", {"messages": image}
    yield "/v1/chat/completions", {"messages": [{"role": f"{image}", "content": "a"}]}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [TEXT, {"type": f"{image}"}]}]}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [TEXT, {"type": "image", "image": image}]}]}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "model": f"{image}"}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "prediction": image}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "metadata": {"a": [image]}}
    yield "/v1/images/generations", {"prompt": "a", "image": image}
    yield "/v1/images/generations", {"prompt": [image]}
    yield "/v1/images/generations", {"prompt": "a", "size": f"{image}"}
    yield "/v1/images/generations", {"prompt": "a", "n": image}
    yield "/v1/images/generations", {"prompt": "a", "model": f"{image}"}


def assert_silent(response):
    sentence = response.json()["error"]["message"]
    assert 400 <= response.status_code < 500
    assert len(sentence) < 1100
    assert not any(NOISE[i : i + 20] in sentence for i in range(len(NOISE) - 20)), sentence


@pytest.mark.parametrize(
    "image",
    [NOISE, "data:image/png;base64," + NOISE, WRAPPED, [NOISE], {"url": NOISE}],
    ids=["text", "url", "wrapped", "list", "object"],
)
def test_no_error_repeats_an_image(client, image):
    for route, body in bodies(image):
        assert_silent(client.post(route, json=body))


def test_no_error_about_a_form_repeats_an_image(client):
    for route, fields in [
        ("/v1/detect", {"clases": NOISE}),
        ("/v1/detect", {"classes": f'["{NOISE}'}),
        ("/v1/detect", {"classes": f'"{NOISE}'}),
        ("/v1/detect", {"score_threshold": NOISE}),
        ("/v1/detect", {NOISE: "a"}),
        ("/v1/region_caption", {"region": f'"{NOISE}"'}),
        ("/v1/images/edits", {"prompt": "a", "size": NOISE}),
        ("/v1/images/edits", {"prompt": "a", "quality": NOISE}),
        ("/v1/images/edits", {"prompt": "a", "mask": NOISE}),
    ]:
        assert_silent(client.post(route, files={"image": png()}, data=fields))


def test_no_path_repeats_an_image(client):
    for path in (f"/v1/{NOISE.replace('/', '_')}", f"/{NOISE}"):
        assert_silent(client.post(path, json={}))


@pytest.mark.parametrize(
    "message",
    [
        "unknown task 'detct'; did you mean 'detect'? tasks: region_caption, region_segment",
        "request: 'messages.10.content.11.image_url.detail' is invalid: it must be 'auto', 'low' or 'high', not 'x'",
        "request: unknown key 'x'; valid keys: max_completion_tokens, prompt_cache_breakpoint, prompt_cache_retention",
    ],
)
def test_words_are_kept(message):
    assert without_data(message) == message


def test_a_long_message_ends_early():
    assert len(without_data("no such class: " + "red circle, " * 500)) < 1010
