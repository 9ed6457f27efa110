"""Files of classes by example, and everything that can be wrong with one."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from lumen_ray.errors import UserError
from lumen_ray.exemplar_file import load_exemplars, read_exemplars
from lumen_ray.exemplars import ClassByExample, Example


@pytest.fixture
def folder(tmp_path):
    """photos/a.png of 64x48 pixels, and photos/turned.jpg, which EXIF turns to 48x64."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "photos" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "photos" / "turned.jpg", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    return tmp_path


def example(**changes):
    return {"image": "photos/a.png", "box": [10, 20, 60, 40]} | changes


def write(folder, content, name="parts.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def one(*examples, **changes):
    return {"classes": [{"name": "bolt", "examples": list(examples or [example()])} | changes]}


def test_a_file_gives_its_classes(folder):
    content = {
        "classes": [
            {
                "name": " bolt ",
                "examples": [
                    example(image="photos/turned.jpg", box=[5, 5, 30, 60], positive=False),
                    example(),
                    example(image="./photos/a.png", box=[0, 0, 64, 48]),
                ],
            },
            {"name": "part 4711", "named": False, "examples": [example(image=str(folder / "photos" / "a.png"))]},
        ]
    }
    bolt, part = read_exemplars(write(folder, content))
    assert (bolt.name, bolt.named, part.name, part.named) == ("bolt", True, "part 4711", False)
    assert [e.positive for e in bolt.examples] == [True, True, False]  # positive ones first
    assert list(bolt.examples[0].box) == [10, 20, 60, 40]
    images = [e.image for e in (*bolt.examples, *part.examples)]
    assert images[0] is images[1] is images[3] and images[0].shape == (48, 64, 3)
    assert images[2].shape == (64, 48, 3)


def test_json_is_read_too(folder):
    path = write(folder, json.dumps(one(), indent="\t"), "parts.json")
    assert [shown.name for shown in read_exemplars(path)] == ["bolt"]
    path.write_text("{")
    with pytest.raises(UserError, match=r"exemplar file '.*parts.json' is not valid JSON"):
        read_exemplars(path)


MISTAKES = {
    "bad yaml": ("classes: [", "is not valid YAML at line"),
    "a list": ("- name: bolt", "must contain a mapping"),
    "empty": ("", "'classes' is required"),
    "no classes": ({"classes": []}, "parts.yaml: it has no classes; list some under 'classes'"),
    "unknown key": (one() | {"clases": []}, "unknown key 'clases'; did you mean 'classes'?"),
    "unknown key of a class": (one(nmaed=False), "class 'bolt': unknown key 'nmaed'; did you mean 'named'?"),
    "unknown key of an example": (one(example(boxes=1)), "class 'bolt': unknown key 'examples.0.boxes'; did you mean"),
    "a name as a class": ({"classes": ["bolt"]}, "class number 1: expected a mapping of settings, got str"),
    "no name": ({"classes": [{"examples": [example()]}]}, "class number 1: 'name' is required"),
    "a number as name": (one(name=7), "class number 1: 'name' is invalid: Input should be a valid string (got 7)"),
    "blank name": (one(name=" "), "parts.yaml: a class by example needs a name"),
    "no examples": (one(examples=[]), "parts.yaml: class 'bolt' has no positive example"),
    "negative alone": (one(example(positive=False)), "has no positive example; give 1 to 8 examples"),
    "too many": (one(*[example()] * 9), "has 9 examples; give at most 8"),
    "no image": (one({"box": [1, 2, 3, 4]}), "class 'bolt': 'examples.0.image' is required"),
    "missing image": (one(example(image="b.png")), "class 'bolt': its image '{}/b.png' does not exist; give the"),
    "broken image": (one(example(image="broken.png")), "class 'bolt': its image '{}/broken.png': the image cannot"),
    "half a box": (one(example(box=[1, 2])), "class 'bolt': the box of an example is [x1, y1, x2, y2] in pixels"),
    "no area": (one(example(box=[10, 20, 10, 40])), "class 'bolt': the box [10.0, 20.0, 10.0, 40.0] of an example"),
    "not a number": (one(example(box=[float("nan"), 20, 10, 40])), "class 'bolt': the box [nan, 20.0, 10.0, 40.0]"),
    "outside": (one(example(box=[10, 20, 65, 40])), "is outside its image of 64x48 pixels"),
    "twice": ({"classes": one()["classes"] * 2}, "parts.yaml: class 'bolt' is given twice by example"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence_that_names_the_file(folder, content, words):
    path = write(folder, content)
    with pytest.raises(UserError) as caught:
        read_exemplars(path)
    message = str(caught.value)
    assert str(path) in message and words.replace("{}", str(folder)) in message and "\n" not in message


def test_no_file(tmp_path):
    for name in ("parts.yaml", "parts.json"):
        with pytest.raises(UserError, match=f"exemplar file '.*{name}' does not exist"):
            read_exemplars(tmp_path / name)


def test_what_a_caller_gives(folder):
    path = write(folder, one())
    image = np.zeros((8, 8, 3), np.uint8)
    here, there = (ClassByExample("nut", [Example([0, 0, 4, 4], image=shown)]) for shown in (None, image))
    assert [shown.name for shown in load_exemplars(path)] == ["bolt"] == [c.name for c in load_exemplars(str(path))]
    assert load_exemplars(None) == [] and load_exemplars([there]) == [there] == load_exemplars(there)
    for given, words in (
        ([here], "class 'nut' has an example without an image"),
        ([there, there], "class 'nut' is given twice"),
        (["nut"], "a list of lumen_ray.ClassByExample, got 'nut'"),
    ):
        with pytest.raises(UserError, match=words):
            load_exemplars(given)
