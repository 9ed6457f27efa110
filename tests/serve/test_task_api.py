"""Every task over HTTP, and everything a caller can get wrong."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import base64_png, png

from lumen_ray.answer import decode_png
from lumen_ray.errors import UserError
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Overloaded, Unavailable
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Masks, SampleSettings
from lumen_ray.tasks import TASKS
from lumen_ray.wire.requests import fields_of
from lumen_ray.wire.schemas import TaskFields

FIELDS = {
    "classes": {"classes": ["red circle", "blue square"]},
    "question": {"text": "what is it ?"},
    "sentence": {"text": "a [red circle] by a [blue square]"},
    "expression": {"text": "the circle at the left"},
    "region": {"region": {"kind": "box", "points": [[1, 2], [8, 9]]}},
    "nothing": {},
    "description": {"text": "a red circle ."},
    "instruction": {"text": "make the circle blue"},
}


def body_of(task, **fields):
    """A request that fits the task, about an image where it sees one."""
    return ({"image": base64_png()} if task.sees_image else {}) | FIELDS[task.needs] | fields


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_every_task_of_the_registry_answers(client, task):
    response = client.post(f"/v1/{task.name}", json=body_of(task))
    assert response.status_code == 200, response.text
    body = response.json()
    size = (16, 20) if task.sees_image else (8, 8)
    assert (body["task"], body["height"], body["width"], body["model"]) == (task.name, *size, "nano@abc123")
    assert set(body["timing_ms"]) == {"decode", "model", "total"}
    if task.is_text:
        assert body["text"] and "instances" not in body
    elif task.result == "image":
        (picture,) = body["images"]
        assert decode_png(base64.b64decode(picture)).shape == (8, 8, 3) and "instances" not in body
    else:
        assert body["route"] == task.routing_token
        assert all(item["box"] == [2, 3, 12, 13] and item["score"] == 0.9 for item in body["instances"])
        assert ("mask" in body["instances"][0]) == (task.result == "masks")
        assert ("keypoints" in body["instances"][0]) == (task.result == "keypoints")
    if task.name == "count":
        assert body["counts"] == {"red circle": 1, "blue square": 1}


def test_phrases_keep_their_order_and_limits_apply(client):
    body = {"image": base64_png(), "classes": ["b", "a"], "score_threshold": 0.1, "max_per_phrase": 1}
    result = client.post("/v1/detect", json=body).json()
    assert result["phrases"] == ["b", "a"] and len(result["instances"]) == 2
    result = client.post("/v1/detect", json={**body, "max_per_phrase": 5}).json()
    assert [i["score"] for i in result["instances"]] == [0.9, 0.2, 0.9, 0.2]


def test_form_upload_gives_what_json_gives(client):
    fields = {"classes": "red circle, blue square", "score_threshold": "0.1"}
    form = client.post("/v1/segment", files={"image": ("x.png", png())}, data=fields).json()
    body = {"image": base64_png(), "classes": ["red circle", "blue square"], "score_threshold": 0.1}
    plain = client.post("/v1/segment", json=body).json()
    assert form["instances"] == plain["instances"] and len(form["instances"]) == 4


CONVERSATION = {
    "text": "what is it ?",
    "history": [["hello", "hi"], ["who ?", "me"]],
    "system": "be brief",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "repetition_penalty": 1.1,
    "stop": ["\n", "a, b"],
    "seed": 3,
}


@pytest.mark.parametrize("with_image", [True, False])
def test_a_conversation_and_its_sampling(client, backend, with_image):
    body = CONVERSATION | ({"image": base64_png()} if with_image else {})
    assert client.post("/v1/chat", json=body).status_code == 200
    image, (asked,), _ = backend.calls[0]
    assert (image is not None) == with_image
    assert (asked.text, asked.system) == ("what is it ?", "be brief")
    assert asked.history == (("hello", "hi"), ("who ?", "me"))
    assert asked.sampling == Sampling(0.5, 0.9, 7, 1.1, 3, ("\n", "a, b"))


def test_a_form_has_the_same_conversation(client, backend):
    lists = {name: json.dumps(CONVERSATION[name]) for name in ("history", "stop")}
    response = client.post("/v1/chat", files={"image": png()}, data=CONVERSATION | lists)
    assert response.status_code == 200, response.text
    client.post("/v1/chat", json=CONVERSATION)
    assert backend.calls[0][1] == backend.calls[1][1]


def test_texts_are_greedy_by_default_and_drawn_anew_without_a_seed(client, backend):
    body = {"image": base64_png()}
    for fields in ({}, {"seed": 4}, {"temperature": 0}):
        client.post("/v1/caption", json=body | fields)
        assert backend.calls[-1][1][0].sampling == GREEDY
    for _ in range(8):
        client.post("/v1/caption", json=body | {"temperature": 0.5})
    assert len({asked.sampling.seed for _, (asked,), _ in backend.calls[-8:]}) == 8


def test_a_form_without_an_image(client, backend):
    """Where JSON may be without one too."""
    for task, status in (("chat", 200), ("generate", 200), ("vqa", 400)):
        response = client.post(f"/v1/{task}", data={"text": "a red circle"}, files={"seed": (None, "1")})
        assert response.status_code == status, response.text
    assert response.json()["error"]["reason"] == "missing_image"
    assert [image for image, _, _ in backend.calls] == [None, None]


def test_form_region_is_json(client, backend):
    data = {"region": json.dumps({"kind": "point", "points": [[3, 4]]})}
    assert client.post("/v1/region_caption", files={"image": png()}, data=data).status_code == 200
    assert backend.calls[0][1][0].region.points.tolist() == [[3, 4]]


def test_data_url_is_taken(client):
    body = {"image": "data:image/png;base64," + base64_png()}
    assert client.post("/v1/caption", json=body).status_code == 200


def test_infer_answers_several_tasks_in_one_call(client, backend):
    requests = [{"task": "detect", "classes": ["a"]}, {"task": "caption"}, {"task": "vqa", "text": "why ?"}]
    response = client.post("/v1/infer", json={"image": base64_png(), "requests": requests})
    assert [a["task"] for a in response.json()["answers"]] == ["detect", "caption", "vqa"]
    assert len(backend.calls) == 1


def test_mask_region_arrives_as_drawn(client, backend):
    pixels = np.zeros((1, 16, 20), bool)
    pixels[0, 2:9, 5:11] = True
    rle = Masks.from_arrays(pixels).rles[0]
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(np.r_[2, pixels[0].T.ravel(), 2])))]
    for counts in (rle["counts"], runs):
        region = {"kind": "mask", "mask": {"size": [16, 20], "counts": counts}}
        response = client.post("/v1/region_caption", json={"image": base64_png(), "region": region})
        assert response.status_code == 200, response.text
        assert backend.calls[-1][1][0].region.rle == rle


BROKEN = base64.b64encode(png()[:40]).decode()
TEXT = base64.b64encode(b"this is not an image").decode()
GOOD = base64_png()
POINT = {"kind": "point", "points": [[3, 4]]}
CASES = {
    "broken image": ("detect", {"image": BROKEN, "classes": ["a"]}, 400, "broken_image"),
    "not an image": ("detect", {"image": TEXT, "classes": ["a"]}, 400, "broken_image"),
    "no image": ("detect", {"classes": ["a"]}, 400, "missing_image"),
    "empty image": ("detect", {"image": "", "classes": ["a"]}, 400, "missing_image"),
    "bad base64": ("detect", {"image": "%%%", "classes": ["a"]}, 400, "invalid_base64"),
    "bad data url": ("detect", {"image": "data:text/html,hi", "classes": ["a"]}, 400, "invalid_base64"),
    "http url": ("detect", {"image": "http://example.org/x.png", "classes": ["a"]}, 400, "remote_image_refused"),
    "file url": ("detect", {"image": "FILE:///etc/passwd", "classes": ["a"]}, 400, "remote_image_refused"),
    "too many pixels": ("detect", {"image": base64_png(200, 100), "classes": ["a"]}, 413, "image_too_large"),
    "unknown task": ("detct", {"image": GOOD, "classes": ["a"]}, 404, "unknown_task"),
    "no classes": ("detect", {"image": GOOD}, 400, "empty_classes"),
    "empty classes": ("detect", {"image": GOOD, "classes": []}, 400, "empty_classes"),
    "blank classes": ("detect", {"image": GOOD, "classes": [" "]}, 400, "empty_classes"),
    "too many classes": ("detect", {"image": GOOD, "classes": list("abcdef")}, 400, "too_many_classes"),
    "too many keypoints": (
        "pose",
        {"image": GOOD, "classes": ["a"], "keypoints": list("abcde")},
        400,
        "too_many_classes",
    ),
    "classes not a list": ("detect", {"image": GOOD, "classes": "a"}, 400, "invalid_request"),
    "no text": ("vqa", {"image": GOOD}, 400, "empty_text"),
    "long text": ("vqa", {"image": GOOD, "text": "x" * 101}, 400, "text_too_long"),
    "reserved text": ("vqa", {"image": GOOD, "text": "what is <region> ?"}, 400, "reserved_text"),
    "reserved class": ("detect", {"image": GOOD, "classes": ["a", "[DET]"]}, 400, "reserved_text"),
    "no phrase": ("ground", {"image": GOOD, "text": "..."}, 400, "empty_sentence"),
    "no region": ("region_caption", {"image": GOOD}, 400, "missing_region"),
    "outside": (
        "region_caption",
        {"image": GOOD, "region": {"kind": "box", "points": [[1, 1], [30, 8]]}},
        400,
        "region_outside_image",
    ),
    "unknown region": ("region_caption", {"image": GOOD, "region": {"kind": "blob"}}, 400, "unknown_region"),
    "inverted box": (
        "region_caption",
        {"image": GOOD, "region": {"kind": "box", "points": [[8, 8], [2, 2]]}},
        400,
        "invalid_region",
    ),
    "mask without rle": ("region_caption", {"image": GOOD, "region": {"kind": "mask"}}, 400, "invalid_region"),
    "points and mask": ("region_caption", {"image": GOOD, "region": {**POINT, "mask": {}}}, 400, "invalid_region"),
    "useless field": ("caption", {"image": GOOD, "classes": ["a"]}, 400, "unexpected_field"),
    "unknown field": ("detect", {"image": GOOD, "clases": ["a"]}, 400, "invalid_request"),
    "history without a question": (
        "chat",
        {"image": GOOD, "text": "a", "history": [["", "b"]]},
        400,
        "invalid_history",
    ),
    "half a turn": ("chat", {"image": GOOD, "text": "a", "history": [["b"]]}, 400, "invalid_request"),
    "long history": ("chat", {"text": "a", "history": [["b" * 100, "c" * 100]]}, 400, "text_too_long"),
    "long system": ("chat", {"text": "a", "system": "b" * 151}, 400, "text_too_long"),
    "reserved history": ("chat", {"text": "a", "history": [["<region>", "b"]]}, 400, "reserved_text"),
    "history of no chat": ("vqa", {"image": GOOD, "text": "a", "history": [["b", "c"]]}, 400, "unexpected_field"),
    "hot": ("chat", {"text": "a", "temperature": 2.5}, 400, "invalid_request"),
    "empty stop": ("chat", {"text": "a", "stop": [""]}, 400, "invalid_sampling"),
    "sampled boxes": ("detect", {"image": GOOD, "classes": ["a"], "temperature": 1}, 400, "unexpected_field"),
    "question without image": ("vqa", {"text": "a"}, 400, "missing_image"),
    "threshold": ("detect", {"image": GOOD, "classes": ["a"], "score_threshold": 2}, 400, "invalid_request"),
}


@pytest.mark.parametrize(("task", "body", "status", "reason"), CASES.values(), ids=CASES)
def test_bad_input_is_one_sentence_with_a_reason(client, backend, task, body, status, reason):
    response = client.post(f"/v1/{task}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["reason"]) == (status, reason), error
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in response.text
    assert len(error["message"]) < 500 and error["request_id"] == response.headers["x-request-id"]
    assert backend.calls == []


def test_errors_name_the_valid_choices(client):
    unknown_task = client.post("/v1/detct", json={}).json()["error"]["message"]
    assert "did you mean 'detect'?" in unknown_task and "region_caption" in unknown_task
    typo = client.post("/v1/detect", json={"image": GOOD, "clases": ["a"]}).json()["error"]["message"]
    assert "did you mean 'classes'?" in typo
    useless = client.post("/v1/caption", json={"image": GOOD, "text": "a"}).json()["error"]["message"]
    assert "does not take 'text'; it takes the image alone, and settings of sampling" in useless


@pytest.mark.parametrize(
    "counts", ["", "5", "\x00\xff", "oooooooo", "z" * 50, [1, 2], [-320, 640], [320], [1.5], None, [0]]
)
def test_mask_region_that_is_no_mask_is_refused_before_pycocotools(client, counts):
    region = {"kind": "mask", "mask": {"size": [16, 20], "counts": counts}}
    response = client.post("/v1/region_caption", json={"image": GOOD, "region": region})
    assert (response.status_code, response.json()["error"]["reason"]) == (400, "invalid_region"), response.text


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_invalid_json(client, body):
    response = client.post("/v1/detect", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["reason"]) == (400, "invalid_json")


def test_infer_refuses_a_bad_entry_as_a_whole(client, backend):
    for requests, status, reason in [
        ([{"task": "caption"}, {"task": "dance"}], 404, "unknown_task"),
        ([], 400, "invalid_request"),
        ([{"task": "caption"}] * 4, 400, "too_many_requests"),
        ([{"task": "detect", "classes": ["a", "b", "c"]}] * 2, 400, "too_many_classes"),
        ([{"task": "generate", "text": "a red circle"}], 400, "unexpected_image"),
    ]:
        response = client.post("/v1/infer", json={"image": GOOD, "requests": requests})
        assert (response.status_code, response.json()["error"]["reason"]) == (status, reason)
    assert backend.calls == []


def test_oversized_body_is_stopped_whatever_the_header_says(client):
    def chunks():
        for _ in range(100):
            yield b"x" * 10_000

    for content in (b"x" * 200_001, chunks()):
        response = client.post("/v1/detect", content=content, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["reason"]) == (413, "body_too_large")


def test_form_errors(client):
    for request, status, reason in [
        ({"data": {"classes": "a"}, "files": {"other": b"x"}}, 400, "invalid_request"),
        ({"data": {"classes": "a"}, "files": {"classes": png()}}, 400, "invalid_request"),
        ({"data": {"clases": "a"}, "files": {"image": png()}}, 400, "invalid_request"),
        ({"data": {"region": "{"}, "files": {"image": png()}}, 400, "invalid_json"),
        ({"content": b"hello", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"content": b"hello", "headers": {"content-type": "multipart/form-data"}}, 400, "invalid_request"),
    ]:
        response = client.post("/v1/detect", **request)
        assert (response.status_code, response.json()["error"]["reason"]) == (status, reason), response.text


def test_failures_of_the_model_side(client, backend, caplog):
    for error, status, reason in [
        (Overloaded("busy", 7), 503, "overloaded"),
        (Unavailable("gone"), 503, "unavailable"),
        (TimeoutError(), 504, "timeout"),
        (UserError("no such keypoint", "unknown_keypoint"), 400, "unknown_keypoint"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ]:
        backend.error = error
        response = client.post("/v1/detect", json={"image": GOOD, "classes": ["a"]})
        body = response.json()["error"]
        assert (response.status_code, body["reason"]) == (status, reason)
        if reason == "overloaded":
            assert response.headers["retry-after"] == "7"
    assert "secret" not in response.text and body["request_id"] in caplog.text and "secret detail" in caplog.text


def test_about_routes_and_pages(client, backend):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 200
    backend.deployments["trunk"] = False
    response = client.get("/readyz")
    assert response.status_code == 503 and response.json()["deployments"] == {"trunk": False, "lumen": True}
    assert [t["name"] for t in client.get("/v1/tasks").json()["tasks"]] == list(TASKS)
    assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
    for path in ("/", "/docs"):
        page = client.get(path).text
        assert "<!doctype html>" in page and "https://" not in page
    assert client.get("/nothing").json()["error"]["reason"] == "not_found"
    wrong = client.get("/v1/detect")
    assert (wrong.status_code, wrong.json()["error"]["reason"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("name", TASKS)
def test_the_fields_of_the_api_name_the_tasks_that_take_them(name):
    fields = TaskFields.model_fields
    for field in fields_of(TASKS[name]):
        if field not in ("height", "width"):  # told to be of the picture made
            assert re.search(rf"\b{name}\b", fields[field].description), field


def test_openapi_describes_every_task_and_resolves(client):
    document = client.get("/openapi.json").json()
    assert {f"/v1/{name}" for name in TASKS} | {"/v1/infer", "/v1/chat/completions"} <= set(document["paths"])
    content = document["paths"]["/v1/detect"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    refs = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert refs <= set(document["components"]["schemas"]) and "RegionPrompt" in refs


def test_request_id_of_the_proxy_is_kept(client):
    given = {"x-request-id": "0123456789abcdef"}
    response = client.post("/v1/detct", json={}, headers=given)
    assert response.json()["error"]["request_id"] == given["x-request-id"]
    response = client.post("/v1/detct", json={}, headers={"x-request-id": "no\tgood"})
    assert response.json()["error"]["request_id"] == response.headers["x-request-id"] != "no\tgood"


def test_pictures_follow_the_request(client, backend):
    fields = {"seed": 3, "steps": 5, "guidance": 2, "height": 16, "width": 24, "num_images": 2}
    body = client.post("/v1/generate", json=body_of(TASKS["generate"], **fields)).json()
    assert [decode_png(base64.b64decode(picture)).shape for picture in body["images"]] == [(16, 24, 3)] * 2
    image, (asked,), _ = backend.calls[-1]
    assert image is None and asked.sample == SampleSettings(5, 2, seed=3, size=(16, 24), num_images=2)
    client.post("/v1/edit", json=body_of(TASKS["edit"], image_guidance=2.5))
    assert backend.calls[-1][1][0].sample == SampleSettings(image_guidance=2.5)


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("generate", {"image": base64_png()}, "unexpected_image"),
        ("edit", {"image": None}, "missing_image"),
        ("detect", {"image": None}, "missing_image"),
        ("generate", {"height": 16}, "invalid_size"),
        ("generate", {"image_guidance": 1}, "unexpected_field"),
        ("detect", {"seed": 1}, "unexpected_field"),
        ("generate", {"num_images": 99}, "invalid_request"),
        ("generate", {"text": " "}, "empty_text"),
    ],
)
def test_what_a_picture_cannot_be_made_of_is_refused(client, task, changes, reason):
    response = client.post(f"/v1/{task}", json=body_of(TASKS[task], **changes))
    assert response.status_code in (400, 413, 422) and response.json()["error"]["reason"] == reason


def test_what_one_request_costs_the_model_is_bounded(backend):
    """64 classes of 2,000 characters kept a trunk busy for 40 seconds, in which nobody else was answered."""
    client = TestClient(create_api(backend, ServeSettings(model="unused")))

    def detect(number, length):
        classes = [f"{n:03}".ljust(length, "x") for n in range(number)]
        return client.post("/v1/detect", json={"image": GOOD, "classes": classes})

    error = detect(64, 2000).json()["error"]
    assert error["reason"] == "too_many_tokens" and "cost 1024000 tokens" in error["message"]
    assert "16384 (limits.max_request_tokens)" in error["message"] and "fewer or shorter" in error["message"]
    assert detect(64, 2000).status_code == 400 and detect(33, 257).status_code == 400 and backend.calls == []
    assert detect(64, 256).status_code == detect(256, 64).status_code == detect(1, 2000).status_code == 200
    tasks = [{"task": "caption", "max_new_tokens": 1024}] * 17
    error = client.post("/v1/infer", json={"image": GOOD, "requests": tasks}).json()["error"]
    assert error["reason"] == "too_many_tokens" and "cost 17408 tokens" in error["message"]
    long = {"text": "a", "history": [["b", "c" * 9_999]] * 3}
    assert client.post("/v1/chat", json=long).json()["error"]["reason"] == "text_too_long"
    assert client.post("/v1/chat", json={**long, "history": long["history"][:2]}).status_code == 200
    tasks = [{"task": "chat", **long, "history": long["history"][:1]}] * 3
    error = client.post("/v1/infer", json={"image": GOOD, "requests": tasks}).json()["error"]
    assert error["reason"] == "text_too_long"
