"""The Open Inference Protocol, by hand and by `tritonclient`."""

from __future__ import annotations

import base64
import json
import struct

import numpy as np
import pytest
from fastapi.testclient import TestClient
from support.live_server import live_server
from support.serve_fakes import base64_png, png

from lumen_ray.answer import decode_png
from lumen_ray.serve.admission import Gate
from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings

INFER = "/v2/models/nano/infer"


def tensor(name, *values, **others):
    return {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": list(values), **others}


IMAGE = tensor("IMAGE", base64_png())


def ask(client, *inputs, path=INFER, **others):
    response = client.post(path, json={"inputs": list(inputs), **others})
    assert response.status_code == 200, response.text
    return response.json()


def data_of(response):
    return {output["name"]: output["data"] for output in response["outputs"]}


def test_health_and_metadata(client, backend):
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/nano", "/v2/models/nano/versions/abc123"):
        assert client.get(f"{path}/ready").json() == {"name": "nano", "ready": True}
        known = client.get(path).json()
        assert known["versions"] == ["abc123"]
        assert known["inputs"][0] == {"name": "IMAGE", "datatype": "BYTES", "shape": [1]}
        assert known["outputs"][0] == {"name": "BOXES", "datatype": "FP32", "shape": [-1, 4]}
    backend.deployments["lumen"] = False
    for path in ("/v2/health/ready", "/v2/models/nano/ready"):
        response = client.get(path)
        assert response.status_code == 503 and response.json()["ready"] is False
    for path in ("/v2/models/x", "/v2/models/nano/versions/2", "/v2/models/x/ready"):
        response = client.get(path)
        assert response.status_code == 404 and set(response.json()) == {"error"}


def test_a_server_that_ends_is_not_ready(backend, settings):
    gate = Gate(settings)
    client = TestClient(create_api(backend, settings, gate))
    gate.is_closed = True
    assert client.get("/v2/health/ready").status_code == 503
    response = client.post(INFER, json={"inputs": [IMAGE]})
    assert response.status_code == 503 and "shutting down" in response.json()["error"]
    assert response.headers["retry-after"]


def test_boxes_scores_and_labels(client):
    response = ask(client, IMAGE, tensor("CLASSES", "a", "b"), id="7", parameters={"score_threshold": 0.1})
    assert (response["model_name"], response["model_version"], response["id"]) == ("nano", "abc123", "7")
    shapes = {output["name"]: (output["datatype"], output["shape"]) for output in response["outputs"]}
    assert shapes["BOXES"] == ("FP32", [4, 4]) and shapes["LABELS"] == ("BYTES", [4]) and shapes["TEXT"][1] == [0]
    data = data_of(response)
    assert data["BOXES"] == [2, 3, 12, 13, 5, 5, 9, 9] * 2 and data["LABELS"] == ["a", "a", "b", "b"]
    assert data["SCORES"] == pytest.approx([0.9, 0.2, 0.9, 0.2]) and data["SIZE"] == [16, 20]


def test_without_classes_the_model_has_its_own(client):
    assert data_of(ask(client, IMAGE))["LABELS"] == ["red circle", "blue square"]
    assert data_of(ask(client, IMAGE, tensor("TASK", "pose")))["LABELS"] == ["red circle"]


def test_a_prompt_alone_is_a_question(client):
    assert data_of(ask(client, IMAGE, tensor("PROMPT", "why ?")))["TEXT"] == ["vqa says why ?"]
    assert data_of(ask(client, tensor("TASK", "chat"), tensor("PROMPT", "why ?")))["TEXT"] == ["chat says why ?"]


def test_masks_keypoints_and_pictures(client):
    data = data_of(ask(client, IMAGE, tensor("TASK", "segment"), tensor("CLASSES", "a")))
    assert json.loads(data["MASKS"][0])["size"] == [16, 20]
    data = data_of(ask(client, IMAGE, tensor("TASK", "pose"), tensor("CLASSES", "a"), tensor("KEYPOINTS", "k")))
    assert json.loads(data["KEYPOINTS"][0]) == {"k": [0.5, 0.5, 0.5]}
    data = data_of(ask(client, tensor("TASK", "generate"), tensor("PROMPT", "a circle")))
    assert decode_png(base64.b64decode(data["PICTURES"][0])).shape == (8, 8, 3)


def test_a_region_is_json(client, backend):
    region = json.dumps({"kind": "point", "points": [[3, 4]]})
    ask(client, IMAGE, tensor("TASK", "region_caption"), tensor("REGION", region))
    assert backend.calls[-1][1][0].region.points.tolist() == [[3, 4]]


def test_data_may_be_nested(client):
    nested = {"name": "CLASSES", "datatype": "BYTES", "shape": [1, 2], "data": [["a", "b"]]}
    assert data_of(ask(client, IMAGE, nested))["LABELS"] == ["a", "b"]


def bytes_tensor(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def binary(client, inputs, rest, length=None, headers=None, **others):
    """POSTs tensors behind the JSON; `length`: given instead of the JSON's."""
    head = json.dumps({"inputs": inputs, **others}).encode()
    given = str(len(head)) if length is None else length
    headers = {"inference-header-content-length": given, **(headers or {})}
    return client.post(INFER, content=head + rest, headers=headers)


def behind(name, size, number=1):
    return {"name": name, "datatype": "BYTES", "shape": [number], "parameters": {"binary_data_size": size}}


def test_tensors_behind_the_json_both_ways(client):
    image, classes = bytes_tensor(png()), bytes_tensor(b"a", "ü".encode())
    inputs = [behind("IMAGE", len(image)), tensor("TASK", "detect"), behind("CLASSES", len(classes), 2)]
    outputs = [{"name": "LABELS", "parameters": {"binary_data": True}}, {"name": "SIZE"}, {"name": "BOXES"}]
    response = binary(client, inputs, image + classes, outputs=outputs, parameters={"binary_data_output": True})
    length = int(response.headers["inference-header-content-length"])
    head, rest = json.loads(response.content[:length]), response.content[length:]
    assert [output["name"] for output in head["outputs"]] == ["LABELS", "SIZE", "BOXES"]
    sizes = [output["parameters"]["binary_data_size"] for output in head["outputs"]]
    assert sizes == [len(bytes_tensor(b"a", "ü".encode())), 8, 32] and len(rest) == sum(sizes)
    assert rest[: sizes[0]] == classes
    assert np.frombuffer(rest[sizes[0] : sizes[0] + 8], "<i4").tolist() == [16, 20]
    assert np.frombuffer(rest[-32:], "<f4").reshape(2, 4).tolist() == [[2, 3, 12, 13]] * 2


def test_an_output_can_be_kept_in_the_json(client):
    outputs = [{"name": "LABELS", "parameters": {"binary_data": False}}]
    response = ask(client, IMAGE, outputs=outputs, parameters={"binary_data_output": True})
    assert data_of(response) == {"LABELS": ["red circle", "blue square"]}


B = bytes_tensor(png())
REFUSED = {
    "length": ([behind("IMAGE", len(B))], B, {"length": "9999"}, "Inference-Header"),
    "length text": ([behind("IMAGE", len(B))], B, {"length": "-1"}, "Inference-Header"),
    "cut JSON": ([behind("IMAGE", len(B))], B, {"length": "5"}, "not valid JSON"),
    "size": ([behind("IMAGE", len(B) + 1)], B, {}, "bytes are left"),
    "rest": ([behind("IMAGE", len(B))], B + b"x", {}, "belong to no input"),
    "not strings": ([behind("IMAGE", 3)], b"abc", {}, "no BYTES tensor"),
    "long string": ([behind("IMAGE", 6)], struct.pack("<I", 9) + b"ab", {}, "no BYTES tensor"),
    "both": ([{**behind("IMAGE", 3), "data": ["a"]}], b"abc", {}, "give its data there alone"),
    "not UTF-8": ([IMAGE, behind("CLASSES", 5)], bytes_tensor(b"\xff"), {}, "not UTF-8"),
    "gzip": ([IMAGE], b"", {"headers": {"content-encoding": "gzip"}}, "uncompressed"),
}


@pytest.mark.parametrize(("inputs", "rest", "others", "words"), REFUSED.values(), ids=REFUSED)
def test_broken_binary_data_is_refused(client, inputs, rest, others, words):
    response = binary(client, inputs, rest, **others)
    assert response.status_code in (400, 415) and words in response.json()["error"], response.text


SHARED = {"name": "BOXES", "parameters": {"shared_memory_region": "r"}}
REFUSED_JSON = {
    "no image": ([tensor("CLASSES", "a")], {}, 400, "needs an image"),
    "two images": ([tensor("IMAGE", base64_png(), base64_png())], {}, 400, "one element"),
    "twice": ([IMAGE, IMAGE], {}, 400, "twice"),
    "unknown input": ([IMAGE, tensor("LABELS", "a")], {}, 400, "inputs: IMAGE"),
    "unknown output": ([IMAGE], {"outputs": [{"name": "X"}]}, 400, "outputs: BOXES"),
    "unknown task": ([IMAGE, tensor("TASK", "detct")], {}, 404, "did you mean 'detect'"),
    "unknown parameter": ([IMAGE], {"parameters": {"sequence_id": 1}}, 400, "unknown key"),
    "datatype": ([{**IMAGE, "datatype": "FP32"}], {}, 400, "BYTES"),
    "shape": ([{**IMAGE, "shape": [2]}], {}, 400, "shape"),
    "negative shape": ([{**IMAGE, "shape": [-1, -1]}], {}, 400, "shape"),
    "numbers": ([tensor("IMAGE", 1)], {}, 400, "list of texts"),
    "no data": ([{"name": "IMAGE", "datatype": "BYTES", "shape": [1]}], {}, 400, "list of texts"),
    "shared memory": ([IMAGE], {"outputs": [SHARED]}, 400, "shared_memory"),
    "region": ([IMAGE, tensor("TASK", "region_caption"), tensor("REGION", "[")], {}, 400, "not valid JSON"),
    "not taken": ([IMAGE, tensor("PROMPT", "a"), tensor("TASK", "detect")], {}, 400, "does not take 'text'"),
}


@pytest.mark.parametrize(("inputs", "others", "status", "words"), REFUSED_JSON.values(), ids=REFUSED_JSON)
def test_errors_are_in_the_envelope_of_kserve(client, inputs, others, status, words):
    response = client.post(INFER, json={"inputs": inputs, **others})
    assert response.status_code == status and set(response.json()) == {"error"}
    assert words in response.json()["error"], response.text


def test_the_client_of_triton(backend):
    http = pytest.importorskip("tritonclient.http")

    def texts(name, *values, in_bytes=True):
        given = http.InferInput(name, [len(values)], "BYTES")
        given.set_data_from_numpy(np.array(values, np.object_), binary_data=in_bytes)
        return given

    with live_server(create_api(backend, ServeSettings(model="unused"))) as base:
        client = http.InferenceServerClient(base.removeprefix("http://"))
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("nano")
        assert not client.is_model_ready("other")
        assert client.get_model_metadata("nano")["inputs"][0]["name"] == "IMAGE"
        found = client.infer("nano", [texts("IMAGE", png()), texts("CLASSES", "mug")], request_id="7")
        assert found.as_numpy("BOXES").tolist() == [[2, 3, 12, 13]] and found.as_numpy("BOXES").dtype == np.float32
        assert found.as_numpy("LABELS").tolist() == [b"mug"] and found.as_numpy("TEXT").shape == (0,)
        assert found.get_response()["id"] == "7"
        inputs = [texts("IMAGE", base64_png(), in_bytes=False), texts("CLASSES", "mug", in_bytes=False)]
        wanted = [http.InferRequestedOutput("BOXES", binary_data=False), http.InferRequestedOutput("SCORES")]
        found = client.infer("nano", inputs, outputs=wanted, parameters={"score_threshold": 0.1})
        assert found.as_numpy("BOXES").shape == (2, 4) and found.as_numpy("SCORES").shape == (2,)
        found = client.infer("nano", [texts("IMAGE", png()), texts("PROMPT", "why ?")], model_version="abc123")
        assert found.as_numpy("TEXT").tolist() == [b"vqa says why ?"] and found.as_numpy("BOXES").shape == (0, 4)
        with pytest.raises(http.InferenceServerException, match="give a complete JPEG"):
            client.infer("nano", [texts("IMAGE", b"junk")])
