"""COCO json and the gallery of a small labelled folder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from support.label_fakes import FakeEngine, write_images

from lumen_ray.answer import Answer
from lumen_ray.data.images import Picture
from lumen_ray.label.gallery import write_gallery
from lumen_ray.label.pipeline import label
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction


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


def test_the_gallery_stands_alone_and_escapes(labelled):
    output, summary = labelled
    page = (output / "gallery.html").read_text()
    assert summary["exports"]["gallery"] == str(output / "gallery.html")
    assert page.count("<figure") == 5 and page.count("<img") == 5 * 3 + 1  # a picture per perception task, the dialog
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is fetched"
    assert 'data-class="circle"' in page and 'data-task="pose"' in page
    assert "broken&lt;b&gt;.png" in page and "broken<b>" not in page and "is 1 &lt; 2 ?" in page
    assert "${visible} images" in page  # the script's own template survives ours


def test_a_gallery_of_some_says_so(labelled):
    output, _ = labelled
    write_gallery(output, max_images=2)
    page = (output / "gallery.html").read_text()
    assert page.count("<figure") == 2 and "the first 2" in page


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


def test_photographs_are_drawn_from_a_reduced_decode(tmp_path):
    """Boxes, masks and keypoints of the stored size are at the same places of a picture an eighth as large."""
    from lumen_ray.label.gallery import _reduced

    image = np.zeros((400, 640, 3), np.uint8)
    picture = Picture(image[::8, ::8], (400, 640), 8)
    mask = np.zeros((1, 400, 640), bool)
    mask[:, 80:240, 160:320] = True
    whole = Prediction("a", Boxes([[160, 80, 320, 240]], (400, 640)), [0.5])
    whole.masks = Masks.from_arrays(mask)
    whole.keypoints = Keypoints([[[160, 80, 0.9]]], ("tip",), (400, 640))
    small = _reduced(Answer("segment", (400, 640), [whole]), picture).predictions[0]
    assert small.boxes.xyxy.tolist() == [[20, 10, 40, 30]] and small.boxes.size == (50, 80)
    assert np.array_equal(small.masks.to_arrays(), mask[:, ::8, ::8])
    np.testing.assert_allclose(small.keypoints.xyv[0, 0], [20, 10, 0.9], atol=1e-6)
    plain = Picture(image, (400, 640))
    assert _reduced(Answer("detect", (400, 640), [whole]), plain).predictions[0] is whole
