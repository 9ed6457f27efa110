"""Classes by example over HTTP."""

from __future__ import annotations

import base64
import json
import pickle

import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, base64_png, pixels_of, png
from support.tiny_models import exemplar_folder, tiny_folder

from lumen_ray.inference.engine import Engine
from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire.settings import Limits

GOOD = base64_png()
OTHER = base64_png(30, 24)


def box(*corners, **changes):
    return {"box": list(corners or (1, 2, 8, 9))} | changes


def bolt(*examples, **changes):
    return {"name": "bolt", "examples": list(examples or [box()])} | changes


def body(*classes, **changes):
    return {"image": GOOD, "classes": list(classes or [bolt()])} | changes


@pytest.fixture
def settings():
    limits = Limits(max_body_bytes=2_000_000, max_pixels=10_000, max_images=2, max_classes=12, max_text_chars=100)
    return ServeSettings(model="unused", limits=limits)


def test_classes_by_example_stand_among_names(client, backend):
    url = f"data:image/png;base64,{OTHER}"
    given = bolt(box(image=OTHER), box(20, 10, 30, 24, image=OTHER, positive=False), box(image=url), box(), named=False)
    response = client.post("/v1/detect", json=body("nut", given))
    assert response.status_code == 200, response.text
    assert response.json()["phrases"] == ["nut", "bolt"]
    assert {i["phrase"] for i in response.json()["instances"]} == {"nut", "bolt"}
    image, (asked,), _ = backend.calls[0]
    shown = asked.examples["bolt"]
    assert image.shape == (16, 20, 3) and list(asked.examples) == ["bolt"] and not shown.named
    assert [e.positive for e in shown.examples] == [True, True, True, False]
    first, by_url, here, negative = shown.examples
    assert first.image is negative.image and first.image.shape == by_url.image.shape == (24, 30, 3)
    assert here.image is None and list(here.box) == [1, 2, 8, 9]
    again = pickle.loads(pickle.dumps(asked)).examples["bolt"].examples  # as it goes to the trunk
    assert again[0].image is again[3].image


def test_a_form_has_the_same_classes(client, backend):
    classes = ["nut", bolt(box(image=OTHER), box())]
    fields = {"classes": json.dumps(classes)}
    assert client.post("/v1/count", files={"image": png()}, data=fields).status_code == 200
    assert client.post("/v1/count", json=body(*classes)).status_code == 200
    form, plain = (asked for _, (asked,), _ in backend.calls)
    assert form.phrases == plain.phrases == ("nut", "bolt")
    assert [e.box for e in form.examples["bolt"].examples] == [e.box for e in plain.examples["bolt"].examples]


def test_repeated_fields_of_a_form_are_a_class_each(client, backend):
    fields = {"classes": ["nut, washer", json.dumps(bolt(box()))]}
    assert client.post("/v1/count", files={"image": png()}, data=fields).status_code == 200
    ((_, (asked,), _),) = backend.calls
    assert asked.phrases == ("nut", "washer", "bolt") and set(asked.examples) == {"bolt"}
    broken = client.post("/v1/count", files={"image": png()}, data={"classes": '{"name": "bolt"'})
    assert broken.status_code == 400 and "is not valid JSON" in broken.text


def test_a_field_of_a_form_may_hold_large_images(client):
    padded = base64.b64encode(png() + b"\0" * 900_000).decode()  # decoders ignore what follows an image
    fields = {"classes": json.dumps([bolt(box(image=padded))])}
    assert client.post("/v1/count", files={"image": png()}, data=fields).status_code == 200


def test_tasks_of_one_call_share_images(client, backend):
    given = bolt(box(image=OTHER))
    requests = [{"task": name, "classes": [given]} for name in ("detect", "segment", "semantic")]
    response = client.post("/v1/infer", json={"image": GOOD, "requests": requests})
    assert [a["phrases"] for a in response.json()["answers"]] == [["bolt"]] * 3
    _, asked, _ = backend.calls[0]
    assert len({id(request.examples["bolt"].examples[0].image) for request in asked}) == 1


BROKEN = base64.b64encode(png()[:40]).decode()
CASES = {
    "neither": (body(3), 400, "invalid_request", "'classes.0' is invalid: it must be a name or an object with"),
    "unknown key": (body(bolt(nmaed=1)), 400, "invalid_request", "unknown key 'classes.0.nmaed'; did you mean 'named'"),
    "key of a box": (
        body("a", bolt(box(imgae="x"))), 400, "invalid_request",
        "unknown key 'classes.1.examples.0.imgae'; did you mean 'image'?",
    ),
    "no name": (body({"examples": [box()]}), 400, "invalid_request", "'classes.0.name' is required"),
    "no examples": (body({"name": "bolt"}), 400, "invalid_request", "'classes.0.examples' is required"),
    "half a box": (body(bolt(box(1, 2))), 400, "invalid_request", "'classes.0.examples.0.box' is invalid"),
    "box of text": (body(bolt({"box": "all"})), 400, "invalid_request", "it must be a list, not a text"),
    "blank name": (body(bolt(name=" ")), 400, "invalid_classes", "needs a name"),
    "long name": (body(bolt(name="x" * 101)), 400, "text_too_long", "a text of 101 characters is too long"),
    "reserved name": (body(bolt(name="[DET]")), 400, "reserved_text", "may not contain '[DET]'"),
    "empty": (body({"name": "bolt", "examples": []}), 400, "invalid_example", "class 'bolt' has no positive example"),
    "negative alone": (body(bolt(box(positive=False))), 400, "invalid_example", "has no positive example"),
    "too many boxes": (body(bolt(*[box()] * 9)), 400, "invalid_example", "has 9 examples"),
    "too many in all": (
        body(bolt(*[box()] * 8), bolt(*[box()] * 8, name="nut")), 400, "too_many_classes",
        "18 classes, phrases, keypoints and examples in one request; give at most 12",
    ),
    "twice": (body(bolt(), bolt()), 400, "duplicate_class", "class 'bolt' is given twice"),
    "no area": (body(bolt(box(5, 5, 5, 9))), 400, "invalid_example", "class 'bolt': the box [5.0, 5.0, 5.0, 9.0]"),
    "outside here": (body(bolt(box(1, 2, 21, 9))), 400, "invalid_example", "outside its image of 20x16 pixels"),
    "outside there": (body(bolt(box(1, 2, 31, 9, image=OTHER))), 400, "invalid_example", "outside its image of 30x24"),
    "broken image": (
        body(bolt(box(image=BROKEN))), 400, "broken_image", "'classes.0.examples.0.image': the image cannot be read"
    ),
    "empty image": (body(bolt(box(image=""))), 400, "missing_image", "'classes.0.examples.0.image' is empty"),
    "no base64": (body(bolt(box(image="%"))), 400, "invalid_base64", "'classes.0.examples.0.image' is not valid"),
    "url": (body(bolt(box(image="http://a.org/b.png"))), 400, "remote_image_refused", "not fetched"),
    "pixels": (
        body(bolt(box(image=base64_png(110, 90)))), 413, "image_too_large", "have 10220 pixels together, more than the"
    ),
    "images": (
        body(bolt(*(box(image=base64_png(n, 20)) for n in (10, 11, 12)))), 400, "too_many_images",
        "3 images of examples in one request; give at most 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "status", "reason", "words"), CASES.values(), ids=CASES)
def test_bad_examples_are_one_sentence_with_a_reason(client, backend, asked, status, reason, words):
    response = client.post("/v1/detect", json=asked)
    error = response.json()["error"]
    assert (response.status_code, error["reason"]) == (status, reason), error
    assert words in error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    assert error["request_id"] == response.headers["x-request-id"] and backend.calls == []


@pytest.mark.parametrize("number", ["1e999", "NaN", "1" + "0" * 400])
def test_numbers_that_are_none(client, number):
    content = json.dumps(body()).replace("[1, 2, 8, 9]", f"[1, 2, 8, {number}]")
    response = client.post("/v1/detect", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text


def test_a_pose_takes_names_only(client):
    error = client.post("/v1/pose", json=body()).json()["error"]
    assert error["reason"] == "invalid_classes" and "takes classes by name only" in error["message"]


def test_places_in_a_call_of_several_tasks(client):
    requests = [{"task": "caption"}, {"task": "detect", "classes": ["a", bolt(box(image=BROKEN))]}]
    error = client.post("/v1/infer", json={"image": GOOD, "requests": requests}).json()["error"]
    assert error["message"].startswith("'requests.1.classes.1.examples.0.image': ")


def test_openapi_describes_both_kinds(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    items = schemas["TaskRequest"]["properties"]["classes"]["anyOf"][0]["items"]["anyOf"]
    assert items == [{"type": "string"}, {"$ref": "#/components/schemas/ClassExamples"}]
    assert schemas["ClassExamples"]["properties"]["examples"]["items"] == {"$ref": "#/components/schemas/ExampleBox"}
    assert {"box", "positive", "image"} == set(schemas["ExampleBox"]["properties"])


class EngineBackend(FakeBackend):
    """A tiny model without Ray."""

    def __init__(self, folder):
        super().__init__()
        self.engine = Engine.load(folder)

    async def infer(self, image, requests, max_new_tokens):
        (found,) = self.engine.run([pixels_of(image)], [requests], max_new_tokens=max_new_tokens)
        return found


def test_a_model_answers_by_example(tmp_path, settings):
    client = TestClient(create_api(EngineBackend(exemplar_folder(tmp_path / "model")), settings))
    scores = []
    for given in ("bolt", bolt(), bolt(box(image=OTHER)), bolt(box(image=OTHER), named=False)):
        answer = client.post("/v1/detect", json=body(given, score_threshold=0, max_per_phrase=3)).json()
        assert answer["phrases"] == ["bolt"]
        scores.append([i["score"] for i in answer["instances"]])
    assert all(scores) and len(set(map(tuple, scores))) == 4


def test_a_model_without_exemplars_refuses_them(tmp_path, settings):
    client = TestClient(create_api(EngineBackend(tiny_folder(tmp_path / "model")), settings))
    response = client.post("/v1/detect", json=body())
    assert (response.status_code, response.json()["error"]["reason"]) == (400, "no_exemplars")
