"""Jobs without a list of classes: each image's own caption names them."""

import csv
import json

import numpy as np
import pytest
from support.label_fakes import EncodingFake, FakeEngine, encode, picture, write_images
from support.tiny_models import tiny_folder
from test_label_pipeline import read_labels

from lumen_ray import export_labels
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example
from lumen_ray.inference.tiles import Tiles
from lumen_ray.label.exporters.labels import open_labels
from lumen_ray.label.pipeline import label
from lumen_ray.label.vocabulary import caption_classes, singular

OPTIONS = {"classes": "auto", "num_actors": 0, "fragment_size": 4, "batch_size": 3, "exports": ()}


@pytest.mark.parametrize(
    ("caption", "classes"),
    [
        ("a red circle , two blue squares and a blue figure .", ["red circle", "blue square", "blue figure"]),
        ("A Dog and dogs near the bus", ["dog", "bus"]),
        ("two buses in a city", ["bus", "city"]),
        ("several people with scissors", ["person", "scissors"]),
        ("a glass of cherries", ["glass", "cherry"]),
        ('a "stop" sign, ...', ['stop" sign']),
        ("", []),
        (" . ", []),
        ("a <region> and a cat", ["cat"]),
    ],
)
def test_the_classes_that_a_caption_names(caption, classes):
    assert caption_classes(caption) == classes


@pytest.mark.parametrize(
    ("plural", "one"),
    [("boxes", "box"), ("benches", "bench"), ("horses", "horse"), ("ties", "tie"), ("tomatoes", "tomato"),
     ("shoes", "shoe"), ("puppies", "puppy"), ("grass", "grass"), ("cactus", "cactus"), ("men", "man")],
)  # fmt: skip
def test_singulars(plural, one):
    assert singular(plural) == one


def empty_after(number):
    """Captions that name nothing from `picture(number)` on."""
    known = {picture(n).tobytes(): n for n in range(32)}
    return lambda image: "a square and two circles ." if known[image.tobytes()] < number else " . "


def test_each_image_is_asked_for_what_its_caption_names(tmp_path):
    photos = write_images(tmp_path / "photos", 6)
    engine = EncodingFake(empty_after(4))
    summary = label(lambda: engine, photos, tmp_path / "out", tasks=["detect", "pose"], **OPTIONS)
    assert engine.encoded == 6  # once each
    rows = read_labels(tmp_path / "out")
    first = [(row["task"], row["phrase"], row["text"]) for row in rows if row["image_id"] == "image000.png"]
    assert first == [
        ("detect", "square", None), ("detect", "circle", None), ("pose", "square", None),
        ("caption", None, "a square and two circles ."),
    ]  # fmt: skip
    last = [(row["task"], row["phrase"], row["height"]) for row in rows if row["image_id"] == "image005.png"]
    assert last == [("detect", None, 48), ("pose", None, 48), ("caption", None, 48)]
    assert json.loads((tmp_path / "out" / "job.json").read_text())["classes"] == "auto"
    assert json.loads(rows[0]["provenance"])["settings"]["classes"] == "auto"
    lines = list(csv.reader((tmp_path / "out" / "vocabulary.csv").open()))
    assert lines == [
        ["task", "phrase", "named", "images", "instances"],
        ["detect", "circle", "4", "4", "4"], ["detect", "square", "4", "4", "4"],
        ["pose", "square", "4", "4", "4"],  # a circle has no keypoints to ask for
    ]  # fmt: skip
    assert summary["vocabulary"]["pose"] == {"square": {"named": 4, "images": 4, "instances": 4}}
    again = label(lambda: engine, photos, tmp_path / "out", tasks=["detect", "pose"], **OPTIONS)
    assert again["vocabulary"] == summary["vocabulary"] and engine.encoded == 6


def test_images_of_several_sizes_keep_their_order(tmp_path):
    photos = write_images(tmp_path / "photos", 3)
    (photos / "image001.png").write_bytes(encode(picture(1, (64, 64))))
    label(EncodingFake, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    boxes = {row["image_id"]: row["box"] for row in read_labels(tmp_path / "out") if row["phrase"] == "square"}
    for n in range(3):
        ys, xs = np.nonzero(picture(n)[..., 0] > 128)
        assert boxes[f"image{n:03d}.png"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_tiles_are_asked_for_what_the_whole_image_names(tmp_path):
    (tmp_path / "photos").mkdir()
    image = picture(1, (48, 120))
    (tmp_path / "photos" / "wide.png").write_bytes(encode(image))
    asked = []

    def caption(shown):
        asked.append(shown.shape)
        return "a square"

    engine = EncodingFake(caption)
    label(lambda: engine, tmp_path / "photos", tmp_path / "out", tasks=["detect"], tiles=Tiles(48), **OPTIONS)
    assert asked == [image.shape]
    rows = [row for row in read_labels(tmp_path / "out") if row["task"] == "detect"]
    ys, xs = np.nonzero(image[..., 0] > 128)
    assert [(row["phrase"], row["box"]) for row in rows] == [
        ("square", [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    ]


def test_exports_collect_their_classes_from_the_rows(tmp_path):
    photos = write_images(tmp_path / "photos", 3)
    label(EncodingFake, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    assert list(open_labels(tmp_path / "out").categories["detect"]) == ["square", "circle"]
    export_labels(tmp_path / "out", ["coco", "yolo-detect"])
    coco = json.loads((tmp_path / "out" / "coco" / "detect.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["square", "circle"]
    assert len(coco["annotations"]) == 6


class Mute(EncodingFake):
    tasks = ("detect",)


class Boneless(EncodingFake):
    skeletons = {}


EXAMPLE = ClassByExample("bolt", [Example((0, 0, 9, 9), image=picture(0))])


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        (EncodingFake, {"tasks": ["caption"]}, "no task takes classes; add one such as detect"),
        (EncodingFake, {"exemplars": [EXAMPLE]}, "give one of the two"),
        (Mute, {}, "it serves no task caption, only: detect"),
        (Boneless, {"tasks": ["pose"]}, "task 'pose' knows no keypoints for classes 'auto'"),
        (FakeEngine, {}, "encodes no images for several questions"),
    ],
)
def test_what_cannot_be_named_is_refused(tmp_path, engine, options, message):
    photos = write_images(tmp_path / "photos", 1)
    with pytest.raises(UserError, match=message):
        label(engine, photos, tmp_path / "out", **{"tasks": ["detect"], **OPTIONS, **options})


def test_a_model_folder_that_writes_no_captions_is_refused_before_it_is_loaded(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tasks": ["detect"]}))
    photos = write_images(tmp_path / "photos", 1)
    with pytest.raises(UserError, match="no task caption") as error:
        label(folder, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    assert error.value.reason == "no_caption" and not (tmp_path / "out").exists()
