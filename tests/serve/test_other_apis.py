"""What holds for all routes that speak another API: no malformed body is the server's fault, and errors keep to the
envelope of the API whatever raised them."""

from __future__ import annotations

import base64
import json
import struct
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.malformed import places, replaced, without
from support.serve_fakes import FakeBackend, base64_png, png

from lumen_ray.answer import encode_png
from lumen_ray.serve.admission import Gate
from lumen_ray.serve.api import create_api
from lumen_ray.serve.http import Overloaded, Unavailable
from lumen_ray.serve.settings import ServeSettings

CLIENT = TestClient(create_api(FakeBackend(), ServeSettings(model="unused")), raise_server_exceptions=False)
#: (route, the key of the message, a body that is answered); names in the bodies are replaced in the tests
ROUTES = [
    ("/hf/object-detection", "error", {"inputs": base64_png(), "parameters": {"threshold": 0.1}}),
    ("/hf/zero-shot-object-detection", "error", {"inputs": base64_png(), "candidate_labels": ["a"]}),
    ("/hf/image-segmentation", "error", {"inputs": base64_png(), "parameters": {"subtask": "semantic"}}),
    ("/hf/image-to-text", "error", {"inputs": base64_png(), "parameters": {"generation_parameters": {"top_k": 2}}}),
    ("/hf/visual-question-answering", "error", {"inputs": {"image": base64_png(), "question": "a"}, "parameters": {}}),
    ("/infer/object_detection", "message", {"class_filter": ["a"], "confidence": 0.1, "max_detections": 3}),
    ("/infer/instance_segmentation", "message", {"model_id": "nano", "response_mask_format": "rle"}),
    ("/infer/keypoints_detection", "message", {"keypoint_confidence": 0.2, "class_filter": ["a"]}),
    ("/infer/lmm", "message", {"prompt": "a", "max_new_tokens": 4}),
    ("/yolo_world/infer", "message", {"text": ["a"], "confidence": 0.1}),
    ("/sam3/concept_segment", "message", {"prompts": [{"type": "text", "text": "a"}], "format": "polygon"}),
    ("/model/add", "message", {"model_id": "nano"}),
    (
        "/v2/models/nano/infer",
        "error",
        {
            "id": "7",
            "inputs": [
                {"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [base64_png()], "parameters": {}},
                {"name": "CLASSES", "datatype": "BYTES", "shape": [1], "data": ["a"]},
            ],
            "outputs": [{"name": "BOXES", "parameters": {"binary_data": False}}],
            "parameters": {"score_threshold": 0.1, "max_per_phrase": 3},
        },
    ),
]
BODIES = {route: body if key == "error" else {"image": {"type": "base64", "value": base64_png()}, **body}
          for route, key, body in ROUTES}  # fmt: skip
KEYS = {route: key for route, key, _ in ROUTES}
anywhere = st.sampled_from(list(BODIES))

names = st.sampled_from(
    ["image", "inputs", "parameters", "data", "name", "threshold", "type", "value", "text", "shape"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [base64_png(), "IMAGE", "TASK", "REGION", "segment", "\ud800", "data:image/png;base64,", "http://a"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def assert_clean(response, key):
    """An answer, or an error of the client's in the envelope of the API."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json()[key] and "Traceback" not in response.text


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("route", BODIES)
def test_the_bodies_are_answered(route):
    response = CLIENT.post(route, json=BODIES[route])
    assert response.status_code == 200, response.text


@FUZZ
@given(anywhere, st.data())
def test_a_value_of_any_kind_in_any_place(route, data):
    body = BODIES[route]
    body = replaced(body, data.draw(st.sampled_from(list(places(body)))), data.draw(values))
    assert_clean(
        CLIENT.post(route, content=json.dumps(body), headers={"content-type": "application/json"}), KEYS[route]
    )


@FUZZ
@given(anywhere, st.data())
def test_a_key_too_few_and_one_too_many(route, data):
    body = BODIES[route]
    path = data.draw(st.sampled_from([path for path in places(body) if path]))
    body = without(body, path)
    if data.draw(st.booleans()):
        body = {**body, data.draw(names | st.text(max_size=5)): data.draw(values)}
    assert_clean(CLIENT.post(route, content=json.dumps(body)), KEYS[route])


@FUZZ
@given(
    anywhere,
    st.binary(max_size=60) | st.text(max_size=40).map(str.encode) | values.map(json.dumps).map(str.encode),
    st.sampled_from(["application/json", "image/png", "text/plain", "", "multipart/form-data; boundary=x", "\xff"]),
)
def test_bytes_of_any_kind(route, body, kind):
    assert_clean(CLIENT.post(route, content=body, headers={"content-type": kind.encode("latin-1")}), KEYS[route])


@FUZZ
@given(anywhere, st.integers(0, 2000), st.integers(0, 2000))
def test_bodies_cut_and_joined(route, begin, end):
    body = json.dumps(BODIES[route]).encode()
    assert_clean(CLIENT.post(route, content=body[:begin] + body[end:]), KEYS[route])


@FUZZ
@given(
    st.integers(-2, 400).map(str) | st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=6),
    st.lists(st.integers(-1, 2**33) | st.none(), min_size=1, max_size=3),
    st.lists(st.integers(-2, 2**62), max_size=3),
    st.binary(max_size=40) | st.binary(max_size=20).map(lambda text: struct.pack("<I", len(text)) + text),
)
def test_binary_tensors_of_any_size(length, sizes, shape, rest):
    names = ("IMAGE", "TASK", "CLASSES")
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": shape or [1], "parameters": {"binary_data_size": size}}
        for name, size in zip(names, sizes, strict=False)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    for given_length in (length, str(len(head))):
        headers = {"inference-header-content-length": given_length}
        assert_clean(CLIENT.post("/v2/models/nano/infer", content=head + rest, headers=headers), "error")


@FUZZ
@given(st.sampled_from(["/hf/", "/infer/", "/v2/models/", "/model/", "/sam3/"]), st.text(max_size=12), st.booleans())
def test_paths_of_any_kind(prefix, name, posts):
    path = prefix + quote(name.encode("utf-8", "replace"))
    response = CLIENT.post(path, json={}) if posts else CLIENT.get(path)
    assert response.status_code < 500


@pytest.mark.parametrize("route", BODIES)
def test_no_error_repeats_an_image(route):
    noise = base64.b64encode(encode_png(np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8))).decode()
    refused = 0
    for path in places(BODIES[route]):
        for value in (noise, [noise], {noise: noise}):
            response = CLIENT.post(route, json=replaced(BODIES[route], path, value))
            assert_clean(response, KEYS[route])
            if response.status_code >= 400:
                refused += 1
                sentence = response.json()[KEYS[route]]
                assert not any(noise[i : i + 20] in sentence for i in range(len(noise) - 20)), sentence
    assert refused


@pytest.mark.parametrize(
    ("error", "status"),
    [(Overloaded("full"), 503), (Unavailable("gone"), 503), (TimeoutError(), 504), (RuntimeError("bug"), 500)],
    ids=str,
)
@pytest.mark.parametrize("route", [route for route in BODIES if route != "/model/add"])
def test_failures_keep_status_headers_and_envelope(route, error, status):
    backend = FakeBackend()
    backend.error = error
    client = TestClient(create_api(backend, ServeSettings(model="unused")))
    response = client.post(route, json=BODIES[route])
    assert response.status_code == status and response.json()[KEYS[route]]
    assert response.headers["x-request-id"] and "bug" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("route", BODIES)
def test_refusals_before_the_route_are_in_the_envelope_too(route):
    settings = ServeSettings(model="unused")
    gate = Gate(settings)
    client = TestClient(create_api(FakeBackend(), settings, gate))
    response = client.put(route, json={})
    assert response.status_code == 405 and "use POST" in response.json()[KEYS[route]]
    response = client.post(route, content=b" " * (settings.limits.max_body_bytes + 1))
    assert response.status_code == 413 and "larger than" in response.json()[KEYS[route]]
    gate.is_closed = True
    response = client.post(route, json=BODIES[route])
    assert response.status_code == 503 and "shutting down" in response.json()[KEYS[route]]


def test_the_errors_of_our_own_routes_stay_ours():
    for path in ("/v1/detect", "/hfx", "/v2x/models"):
        assert set(CLIENT.post(path, json={}).json()["error"]) >= {"message", "reason", "request_id"}
    assert CLIENT.post("/hf/object-detection", content=png()).status_code == 200


def test_openapi_resolves_and_has_the_bodies():
    document = CLIENT.get("/openapi.json").json()
    known = document["components"]["schemas"]
    refs = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert refs <= set(known) and "HTTPValidationError" not in known  # errors have the envelopes
    for route in BODIES:
        path = route.replace("/nano", "/{name}")
        assert document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    operations = [entry["operationId"] for path in document["paths"].values() for entry in path.values()]
    assert len(set(operations)) == len(operations)
