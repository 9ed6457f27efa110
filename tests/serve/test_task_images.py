"""Frame and size of answers, and several images in one request to `/v1/infer`."""

from __future__ import annotations

import asyncio
import io

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.serve_fakes import FakeBackend, base64_png

from lumen_ray.errors import UserError
from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire import images as wire_images

DETECT = {"task": "detect", "classes": ["a"]}


def turned() -> bytes:
    """A JPEG of 20x16 that its EXIF tag turns by a quarter."""
    image, buffer = Image.new("RGB", (20, 16)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_size_and_frame_are_of_the_turned_image(client):
    body = client.post("/v1/detect", files={"image": turned()}, data={"classes": "a"}).json()
    assert body["size"] == [20, 16] == [body["height"], body["width"]] and body["frame"] == "exif_rotated"
    assert "image" not in body
    requests = [DETECT, {"task": "caption"}]
    body = client.post("/v1/infer", json={"image": base64_png(), "requests": requests}).json()
    assert [(a["size"], a["frame"]) for a in body["answers"]] == [([16, 20], "exif_rotated")] * 2


def test_each_image_gets_all_tasks_in_a_call_of_its_own(client, backend):
    images = [base64_png(20, 16), base64_png(30, 10)]
    body = client.post("/v1/infer", json={"images": images, "requests": [DETECT]}).json()
    assert [(a["image"], a["task"], a["size"]) for a in body["answers"]] == [
        (0, "detect", [16, 20]),
        (1, "detect", [10, 30]),
    ]
    assert len(backend.calls) == 2 and set(body["timing_ms"]) == {"decode", "model", "total"}


@pytest.mark.parametrize(
    ("body", "reason", "words"),
    [
        ({}, "missing_image", "give 'image', 'images' or 'image_id'"),
        ({"image": base64_png(), "images": [base64_png()]}, "two_images", "one of 'image', 'images' and"),
        ({"images": []}, "invalid_request", "'images'"),
        ({"images": [base64_png()] * 9}, "too_many_images", "at most 8"),
        ({"images": [base64_png(), "anVuaw=="]}, "broken_image", "'images.1'"),
        ({"images": [base64_png(), "!"]}, "invalid_base64", "'images.1'"),
        ({"images": [base64_png(90, 60)] * 2}, "image_too_large", "pixels together"),
        ({"images": [base64_png()] * 4}, "too_many_requests", "4 tasks"),
        ({"images": [base64_png()] * 2, "requests": [{"task": "detect", "classes": ["a", "b", "c"]}]},
         "too_many_classes", "6 classes"),
    ],
)  # fmt: skip
def test_limits_hold_for_all_images_together(client, backend, body, reason, words):
    response = client.post("/v1/infer", json={"requests": [DETECT], **body})
    error = response.json()["error"]
    assert error["reason"] == reason and words in error["message"], error
    assert backend.calls == []


def test_an_error_about_one_image_gives_the_others_up():
    cancelled, begun = [], asyncio.Event()

    class Backend(FakeBackend):
        async def infer(self, image, requests, max_new_tokens):
            if image.size[0] == 16:
                await begun.wait()
                raise UserError("no", "no_room")
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(image.size)
                raise

    client = TestClient(create_api(Backend(), ServeSettings(model="unused")))
    images = [base64_png(20, 16), base64_png(30, 10)]
    response = client.post("/v1/infer", json={"images": images, "requests": [DETECT]})
    assert response.json()["error"]["reason"] == "no_room" and cancelled == [(10, 30)]


def test_images_of_examples_are_decoded_once_and_count_once(backend, settings, monkeypatch):
    decoded = []
    decode = wire_images.decode_reduced
    monkeypatch.setattr(wire_images, "decode_reduced", lambda *args: decoded.append(args) or decode(*args))
    client = TestClient(create_api(backend, settings))
    shown = {"name": "bolt", "examples": [{"box": [1, 1, 9, 9], "image": base64_png(30, 20)}]}
    images = [base64_png(20 + n, 16) for n in range(2)]
    asked = {"task": "detect", "classes": [shown]}
    assert client.post("/v1/infer", json={"images": images, "requests": [asked]}).status_code == 200
    assert len(decoded) == 3
    large = {"name": "bolt", "examples": [{"box": [1, 1, 9, 9], "image": base64_png(99, 99)}]}
    body = {"images": images, "requests": [asked | {"classes": [large]}]}
    assert client.post("/v1/infer", json=body).json()["error"]["reason"] == "image_too_large"
