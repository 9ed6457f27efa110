"""COCO json and the gallery of a small labelled folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from support.gallery_files import read_gallery
from support.label_fakes import FakeEngine, write_images

from lumen_ray.label.pipeline import label


def make_engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    photos = write_images(folder / "photos", 5)
    (photos / "broken<b>.png").write_bytes(b"")
    summary = label(
        make_engine, photos, folder / "out", tasks=["detect", "segment", "pose", "caption", "vqa"],
        classes=["square", "circle"], prompts={"vqa": ["is 1 < 2 ?"]}, num_actors=0, fragment_size=2,
    )  # fmt: skip
    return folder / "out", summary


def test_coco_files_load_and_agree_with_the_labels(labelled):
    output, summary = labelled
    assert sorted(path.name for path in Path(summary["exports"]["coco"]).glob("*.json")) == [
        "captions.json", "detect.json", "pose.json", "segment.json", "vqa.json"
    ]  # fmt: skip
    for name in ("captions", "vqa"):
        assert len(COCO(output / "coco" / f"{name}.json").getAnnIds()) == 5
    for task in ("detect", "segment", "pose"):
        assert len(COCO(output / "coco" / f"{task}.json").getAnnIds()) == summary["instances"][task]
    data = json.loads((output / "coco" / "segment.json").read_text())
    assert [c["name"] for c in data["categories"]] == ["square", "circle"] and len(data["images"]) == 5
    image, first = data["images"][0], data["annotations"][0]
    assert (image["file_name"], image["height"], image["width"]) == ("image000.png", 48, 64)
    mask = coco_mask.decode(first["segmentation"])
    ys, xs = np.nonzero(mask)
    assert first["bbox"] == [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
    assert first["area"] == mask.sum() and first["score"] == pytest.approx(0.9)


def test_coco_keypoints_and_captions(labelled):
    output, _ = labelled
    pose = json.loads((output / "coco" / "pose.json").read_text())
    assert pose["categories"][0]["keypoints"] == ["top", "bottom"]
    assert pose["categories"][0]["skeleton"] == [[1, 2]]
    first = pose["annotations"][0]
    assert first["num_keypoints"] == 1 and first["keypoints"][2:] == [2, 0, 0, 0]  # the second scores 0.1
    captions = json.loads((output / "coco" / "captions.json").read_text())["annotations"]
    assert len(captions) == 5 and captions[0]["caption"] == "a square 250" and captions[0]["image_id"] == 1


def test_the_gallery_shows_all_images_and_the_one_that_failed(labelled):
    output, summary = labelled
    assert summary["exports"]["gallery"] == str(output / "gallery.html") and (output / "gallery.html").is_file()
    meta, cards, _ = read_gallery(output / "gallery")
    assert len(cards) == 6 and cards[0]["e"][0] == "broken_image" and cards[0]["i"] == "broken<b>.png"
    assert [task["name"] for task in meta["tasks"]] == ["detect", "segment", "pose", "caption", "vqa"]
    assert cards[1]["x"]["4"] == [["is 1 < 2 ?", "is 1 < 2 ? 250"]]


def test_classes_without_instances_are_categories_too(tmp_path):
    photos = write_images(tmp_path / "photos", 1)
    label(
        make_engine, photos, tmp_path / "out", tasks=["detect", "caption"], classes=["circle", "square"],
        num_actors=0, score_threshold=1,
    )  # fmt: skip
    data = json.loads((tmp_path / "out" / "coco" / "detect.json").read_text())
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(1, "circle"), (2, "square")]
    assert data["annotations"] == [] and len(data["images"]) == 1
    assert "categories" not in json.loads((tmp_path / "out" / "coco" / "captions.json").read_text())


def test_exports_name_the_version_that_the_labels_were_made_with(tmp_path):
    options = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "exports": ["coco", "labelstudio"]}
    label(FakeEngine, write_images(tmp_path / "in", 1), tmp_path / "out", **options)
    coco = json.loads((tmp_path / "out" / "coco" / "detect.json").read_text())
    (task,) = json.loads((tmp_path / "out" / "labelstudio" / "tasks.json").read_text())
    assert coco["info"]["version"] == task["predictions"][0]["model_version"] == FakeEngine.version


def test_poses_have_the_classes_with_a_skeleton_only(tmp_path):
    options = {"tasks": ["detect", "pose"], "classes": ["square", "circle"], "num_actors": 0, "exports": ["coco"]}
    for keypoints, posed in ((None, ["square"]), (["top", "bottom"], ["square", "circle"])):
        out = tmp_path / f"out{len(posed)}"
        label(FakeEngine, write_images(tmp_path / "in", 1), out, keypoints=keypoints, **options)
        for task, names in (("detect", ["square", "circle"]), ("pose", posed)):
            found = json.loads((out / "coco" / f"{task}.json").read_text())
            assert [category["name"] for category in found["categories"]] == names
