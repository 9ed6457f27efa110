"""`/hf/<task>`, by hand and by `huggingface_hub`."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image
from support import serve_fakes as fakes
from support.live_server import live_server
from support.serve_fakes import base64_png, png

from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Boxes

BOX = {"xmin": 2, "ymin": 3, "xmax": 12, "ymax": 13}


def test_bytes_are_enough_for_the_models_own_classes(client):
    for headers in ({}, {"content-type": "image/png"}, {"content-type": "application/x-www-form-urlencoded"}):
        found = client.post("/hf/object-detection", content=png(), headers=headers).json()
        assert found == [{"score": 0.9, "label": name, "box": BOX} for name in ("red circle", "blue square")]


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": base64_png(), "parameters": {"candidate_labels": ["a", "b"]}},
        {"inputs": base64_png(), "candidate_labels": ["a", "b"]},
        {"inputs": {"image": "data:image/png;base64," + base64_png(), "candidate_labels": ["a", "b"]}},
    ],
    ids=["parameters", "beside", "inside"],
)
@pytest.mark.parametrize("task", ["object-detection", "zero-shot-object-detection", "image-segmentation"])
def test_classes_stand_wherever_clients_put_them(client, backend, task, body):
    response = client.post(f"/hf/{task}", json=body)
    assert response.status_code == 200, response.text
    assert {item["label"] for item in response.json()} == {"a", "b"}
    assert backend.calls[-1][1][0].phrases == ("a", "b")


def test_the_address_may_have_the_classes(client, backend):
    path = "/hf/object-detection?candidate_labels=a, b&candidate_labels=c"
    assert client.post(path, content=png()).status_code == 200
    assert backend.calls[-1][1][0].phrases == ("a", "b", "c")


def test_objects_come_best_first_whatever_their_class(client):
    body = {"inputs": base64_png(), "parameters": {"threshold": 0.1}}
    found = client.post("/hf/object-detection", json=body).json()
    assert [item["score"] for item in found] == [0.9, 0.9, 0.2, 0.2]


def test_boxes_are_rounded_to_whole_pixels(client, backend, monkeypatch):
    monkeypatch.setattr(fakes, "Boxes", lambda _, size: Boxes([[2.4, 3.6, 12.5, 13.51], [1, 1, 2, 2]], size))
    (first, *_) = client.post("/hf/object-detection", content=png()).json()
    assert first["box"] == {"xmin": 2, "ymin": 4, "xmax": 12, "ymax": 14}  # half to even


def test_masks_are_pngs_of_one_channel(client):
    (first, _) = client.post("/hf/image-segmentation", content=png()).json()
    mask = Image.open(io.BytesIO(base64.b64decode(first["mask"])))
    assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (20, 16))
    wanted = np.zeros((16, 20), np.uint8)
    wanted[3:13, 2:12] = 255
    assert (np.asarray(mask) == wanted).all()


def test_the_subtask_chooses_the_task(client, backend):
    for subtask, task in ((None, "segment"), ("instance", "segment"), ("semantic", "semantic")):
        body = {"inputs": base64_png(), "parameters": {"subtask": subtask, "mask_threshold": 0.5}}
        assert client.post("/hf/image-segmentation", json=body).status_code == 200
        assert backend.calls[-1][1][0].task == task


def test_a_caption_takes_settings_of_generation(client, backend):
    assert client.post("/hf/image-to-text", content=png()).json() == [{"generated_text": "caption says"}]
    assert backend.calls[-1][1][0].sampling == GREEDY
    how = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_new_tokens": 9, "num_beams": 1}
    body = {"inputs": base64_png(), "parameters": {"generation_parameters": how}}
    assert client.post("/hf/image-to-text", json=body).status_code == 200
    _, (asked,), longest = backend.calls[-1]
    assert asked.sampling == Sampling(0.5, top_k=7, seed=asked.sampling.seed) and longest == 9
    how = {"temperature": 0.5}  # without do_sample it has no effect, as in transformers
    body = {"inputs": base64_png(), "parameters": {"generation_parameters": how, "max_new_tokens": 5}}
    client.post("/hf/image-to-text", json=body)
    assert backend.calls[-1][1][0].sampling == GREEDY and backend.calls[-1][2] == 5


def test_the_score_of_an_answer_is_its_probability(client, backend, monkeypatch):
    plain = fakes.fake_answer

    def with_log_probs(request, size):
        answer = plain(request, size)
        answer.log_probs = [math.log(0.5), math.log(0.25)]
        return answer

    monkeypatch.setattr(fakes, "fake_answer", with_log_probs)
    body = {"inputs": {"image": base64_png(), "question": "why ?"}}
    (found,) = client.post("/hf/visual-question-answering", json=body).json()
    assert found["answer"] == "vqa says why ?" and found["score"] == pytest.approx(0.125)


def with_parameters(**parameters):
    return {"json": {"inputs": base64_png(), "parameters": parameters}}


DETECT, SEGMENT, TEXT = "object-detection", "image-segmentation", "image-to-text"
REFUSED = {
    "empty": (DETECT, {"content": b""}, 400, "the body is empty"),
    "broken": (DETECT, {"content": b"junk"}, 400, "cannot be read"),
    "form": (DETECT, {"files": {"image": png()}}, 415, "a form is not taken"),
    "json list": (DETECT, {"json": []}, 400, "must be a JSON object"),
    "no inputs": (DETECT, {"json": {}}, 400, "'inputs' is required"),
    "inputs": (DETECT, {"json": {"inputs": 3}}, 400, "'inputs' is invalid"),
    "url": (DETECT, {"json": {"inputs": "http://a/b.png"}}, 400, "not fetched"),
    "threshold": (DETECT, with_parameters(threshold=2), 400, "'parameters.threshold'"),
    "unknown": (DETECT, with_parameters(treshold=1), 400, "did you mean 'threshold'"),
    "no labels": (f"zero-shot-{DETECT}", {"content": png()}, 400, "candidate_labels"),
    "empty labels": (f"zero-shot-{DETECT}", with_parameters(candidate_labels=[" "]), 400, "at least one"),
    "no question": ("visual-question-answering", {"content": png()}, 400, "'question'"),
    "panoptic": (SEGMENT, with_parameters(subtask="panoptic"), 400, "'panoptic'"),
    "overlap": (SEGMENT, with_parameters(overlap_mask_area_threshold=0.5), 400, "may overlap"),
    "beams": (TEXT, with_parameters(generation_parameters={"num_beams": 4}), 400, "no beam search"),
    "task": ("object-detektion", {"content": png()}, 404, "nothing at"),
    "large": (DETECT, {"content": b"x" * 300_000}, 413, "larger than"),
    "pixels": (DETECT, {"content": png(200, 100)}, 413, "pixels allowed"),
}


@pytest.mark.parametrize(("task", "body", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_errors_are_in_the_envelope_of_hugging_face(client, task, body, status, words):
    response = client.post(f"/hf/{task}", **body)
    assert response.status_code == status
    assert set(response.json()) == {"error", "error_type"} and words in response.json()["error"]


def test_a_model_without_classes_asks_for_some(client, backend, monkeypatch):
    monkeypatch.setattr(fakes, "INFO", {**fakes.INFO, "classes": []})
    response = client.post("/hf/object-detection", content=png())
    assert response.status_code == 400 and "'candidate_labels'" in response.json()["error"]


def test_the_client_of_hugging_face(backend, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", False
    )  # which CI sets, and which holds for this machine too
    with live_server(create_api(backend, ServeSettings(model="unused"))) as base:
        client = hub.InferenceClient()
        found = hub.InferenceClient(base_url=f"{base}/hf/object-detection").object_detection(png())
        assert [(item.label, item.box.xmin, item.box.ymax) for item in found][0] == ("red circle", 2, 13)
        address = f"{base}/hf/object-detection?candidate_labels=a b,c"
        found = client.object_detection(png(), threshold=0.1, model=address)
        assert [item.label for item in found] == ["a b", "c", "a b", "c"]
        (first, _) = client.image_segmentation(png(), subtask="instance", model=f"{base}/hf/image-segmentation")
        assert first.mask.size == (20, 16) and first.mask.getextrema() == (0, 255)
        assert client.image_to_text(png(), model=f"{base}/hf/image-to-text").generated_text == "caption says"
        (answer,) = client.visual_question_answering(png(), "why ?", model=f"{base}/hf/visual-question-answering")
        assert answer.answer == "vqa says why ?"
        with pytest.raises(hub.errors.HfHubHTTPError, match="give a complete JPEG"):
            client.object_detection(b"junk", model=f"{base}/hf/object-detection")
