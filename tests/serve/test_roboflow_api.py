"""Roboflow's routes, by hand and by `inference_sdk`."""

from __future__ import annotations

import numpy as np
import pytest
from support import serve_fakes as fakes
from support.live_server import live_server
from support.serve_fakes import base64_png, png

from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Masks

IMAGE = {"type": "base64", "value": base64_png()}
#: what the client sends of its own
SENT = {"api_key": "secret", "disable_active_learning": False, "visualize_predictions": False, "source": "x"}


def ask(client, route, **body):
    response = client.post(route, json={"image": IMAGE, **SENT, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_boxes_have_centre_and_size(client):
    found = ask(client, "/infer/object_detection", model_id="nano")
    (first, second) = found["predictions"]
    assert {name: first[name] for name in ("x", "y", "width", "height")} == {"x": 7, "y": 8, "width": 10, "height": 10}
    assert (first["class"], first["class_id"], first["confidence"]) == ("red circle", 0, 0.9)
    assert (second["class"], second["class_id"]) == ("blue square", 1)
    assert found["image"] == {"width": 20, "height": 16} and found["time"] >= 0 and found["model"] == "nano@abc123"


def test_a_filter_may_name_classes_that_the_model_does_not(client, backend):
    found = ask(client, "/infer/object_detection", class_filter=["mug", "blue square"], confidence=0.1)["predictions"]
    assert [(p["class"], p["class_id"], p["confidence"]) for p in found] == [
        ("mug", 2, 0.9),
        ("blue square", 1, 0.9),
        ("mug", 2, 0.2),
        ("blue square", 1, 0.2),
    ]
    found = ask(client, "/infer/object_detection", confidence="default", max_detections=1)["predictions"]
    assert [p["confidence"] for p in found] == [0.9]
    assert backend.calls[-1][1][0].score_threshold == 0.3


def test_several_images_are_answered_by_a_list(client, backend):
    other = {"type": "base64", "value": base64_png(30, 10)}
    found = ask(client, "/infer/object_detection", image=[IMAGE, other])
    assert [answer["image"] for answer in found] == [{"width": 20, "height": 16}, {"width": 30, "height": 10}]
    assert len(backend.calls) == 2


@pytest.mark.parametrize(("given", "form"), [(None, "polygon"), ("polygon", "polygon"), ("rle", "rle")])
def test_masks_are_polygons_or_run_lengths(client, given, form):
    (first, _) = ask(client, "/infer/instance_segmentation", response_mask_format=given)["predictions"]
    assert first["mask_format"] == form
    if form == "polygon":
        assert {(p["x"], p["y"]) for p in first["points"]} == {(2, 3), (11, 3), (11, 12), (2, 12)}
    else:
        (mask,) = Masks([first["rle"]], (16, 20)).to_arrays()
        assert mask.sum() == 100 and mask[3:13, 2:12].all()


def test_keypoints_are_of_the_classes_with_a_skeleton(client, backend):
    (first,) = ask(client, "/infer/keypoints_detection")["predictions"]
    assert backend.calls[-1][1][0].phrases == ("red circle",)
    assert first["keypoints"] == [
        {"x": 0.5, "y": 0.5, "confidence": 0.5, "class": "top", "class_id": 0},
        {"x": 0.5, "y": 0.5, "confidence": 0.5, "class": "left", "class_id": 1},
    ]
    (first,) = ask(client, "/infer/keypoints_detection", keypoint_confidence=0.6)["predictions"]
    assert first["keypoints"] == []


def test_classes_and_concepts_by_name(client):
    (first,) = ask(client, "/yolo_world/infer", text=["mug"], yolo_world_version_id="l")["predictions"]
    assert first["class"] == "mug"
    prompts = [{"type": "text", "text": "mug"}, {"type": "text", "text": "mug", "output_prob_thresh": 0.1}]
    found = ask(client, "/sam3/concept_segment", prompts=prompts, model_id="sam3/sam3_final", output_prob_thresh=0.5)
    assert [len(result["predictions"]) for result in found["prompt_results"]] == [1, 2]
    assert found["prompt_results"][1]["echo"] == {"prompt_index": 1, "type": "text", "text": "mug", "num_boxes": 0}
    mask = found["prompt_results"][0]["predictions"][0]
    assert mask["format"] == "polygon" and sorted(mask["masks"][0]) == [[2, 3], [2, 12], [11, 3], [11, 12]]
    found = ask(client, "/sam3/concept_segment", prompts=prompts[:1], format="rle")
    assert found["prompt_results"][0]["predictions"][0]["masks"]["size"] == [16, 20]


def test_a_prompt_is_a_question_and_none_asks_for_a_caption(client):
    assert ask(client, "/infer/lmm", model_id="nano")["response"] == "caption says"
    assert ask(client, "/infer/lmm/nano", prompt="why ?")["response"] == "vqa says why ?"


def test_the_registry_has_the_served_tasks_only(client, monkeypatch):
    models = client.get("/model/registry").json()["models"]
    assert [model["model_id"] for model in models][:2] == ["nano", "nano/object-detection"]
    assert models[0]["task_type"] == "object-detection" and models[0]["input_height"] == 128
    assert client.post("/model/add", json={"model_id": "nano", "api_key": None}).json()["models"] == models
    monkeypatch.setattr(fakes, "INFO", {**fakes.INFO, "tasks": ["segment"]})
    (model,) = client.get("/model/registry").json()["models"]
    assert model["model_id"] == "nano/instance-segmentation"


LARGE, JUNK = {**IMAGE, "value": base64_png(90, 60)}, {**IMAGE, "value": "anVuaw=="}
REFUSED = {
    "model": ("/infer/object_detection", {"model_id": "coco/3"}, 404, "models: nano, nano/object-detection"),
    "add": ("/model/add", {"model_id": "coco/3"}, 404, "models: nano"),
    "url": ("/infer/object_detection", {"image": {"type": "url", "value": "http://a"}}, 400, "not fetched"),
    "pickle": ("/infer/object_detection", {"image": {"type": "numpy", "value": "gASV"}}, 400, "pickled"),
    "no image": ("/infer/object_detection", {"image": []}, 400, "'image'"),
    "many": ("/infer/object_detection", {"image": [IMAGE] * 9}, 400, "at most 8"),
    "too large together": ("/yolo_world/infer", {"image": [LARGE] * 2, "text": ["a"]}, 413, "pixels together"),
    "too much together": ("/yolo_world/infer", {"image": [IMAGE] * 3, "text": ["a", "b"]}, 400, "give at most 5"),
    "broken": ("/infer/object_detection", {"image": [IMAGE, JUNK]}, 400, "'image.1'"),
    "confidence": ("/infer/object_detection", {"confidence": 30}, 400, "'confidence'"),
    "best": ("/infer/object_detection", {"confidence": "best"}, 400, "'default'"),
    "drawn": ("/infer/object_detection", {"visualize_predictions": True}, 400, "not drawn"),
    "raw frame": ("/infer/object_detection", {"disable_preproc_auto_orient": True}, 400, "EXIF"),
    "visual": ("/sam3/concept_segment", {"prompts": [{"type": "visual", "text": "a"}]}, 400, "'text'"),
    "boxes": ("/sam3/concept_segment", {"prompts": [{"text": "a", "boxes": [[1, 2, 3, 4]]}]}, 400, "by example"),
    "no names": ("/yolo_world/infer", {"text": []}, 400, "at least one"),
    "route": ("/infer/classification", {}, 404, "nothing at"),
}


@pytest.mark.parametrize(("route", "body", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_errors_are_in_the_envelope_of_roboflow(client, route, body, status, words):
    response = client.post(route, json={"image": IMAGE, **SENT, **body})
    assert response.status_code == status, response.text
    assert words in response.json()["message"] and response.json()["request_id"]
    assert "secret" not in response.text


def test_the_client_of_roboflow(backend, tmp_path):
    sdk = pytest.importorskip("inference_sdk")
    photo = tmp_path / "photo.png"
    photo.write_bytes(png())
    with live_server(create_api(backend, ServeSettings(model="unused"))) as base:
        client = sdk.InferenceHTTPClient(api_url=base, api_key="any")
        assert client.get_server_info().name == "lumen_ray"
        found = client.infer(str(photo), model_id="nano")
        assert [p["class"] for p in found["predictions"]] == ["red circle", "blue square"]
        wanted = sdk.InferenceConfiguration(class_filter=["mug"], confidence_threshold=0.1, max_batch_size=2)
        with client.use_configuration(wanted):
            first, second = client.infer([str(photo), np.zeros((30, 40, 3), np.uint8)], model_id="nano")
        assert [p["class"] for p in first["predictions"]] == ["mug", "mug"]
        assert second["image"] == {"width": 40, "height": 30}
        (mask, _) = client.infer(str(photo), model_id="nano/instance-segmentation")["predictions"]
        assert mask["points"][0] == {"x": 2, "y": 3}
        (pose,) = client.infer(str(photo), model_id="nano/keypoint-detection")["predictions"]
        assert [point["class"] for point in pose["keypoints"]] == ["top", "left"]
        ((found,),) = [answer["predictions"] for answer in client.infer_from_yolo_world(str(photo), ["mug"])]
        assert found["class"] == "mug"
        concepts = client.sam3_concept_segment(str(photo), prompts=[{"type": "text", "text": "mug"}])
        assert len(concepts["prompt_results"][0]["predictions"]) == 1
        assert client.infer_lmm(str(photo), "nano", prompt="why ?")["response"] == "vqa says why ?"
        with pytest.raises(sdk.http.errors.HTTPCallErrorError, match="unknown model 'coco/3'"):
            client.infer(str(photo), model_id="coco/3")


def test_supervision_reads_the_same_masks(client):
    sv = pytest.importorskip("supervision")
    for form in ("polygon", "rle"):
        found = ask(client, "/infer/instance_segmentation", response_mask_format=form)
        detections = sv.Detections.from_inference(found)
        assert detections.xyxy.tolist() == [[2, 3, 12, 13]] * 2 and detections.class_id.tolist() == [0, 1]
        assert detections.mask.sum(axis=(1, 2)).tolist() == [100, 100] and detections.mask[0, 3:13, 2:12].all()
