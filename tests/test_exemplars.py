"""Classes given by example: what is accepted, and what the prompt says."""

import numpy as np
import pytest

from lumen_ray import exemplars
from lumen_ray.errors import UserError
from lumen_ray.exemplars import MOST_EXAMPLES, ClassByExample, Example, exemplar_phrase
from lumen_ray.inference.request import check_requests, make_request

IMAGE = np.zeros((40, 60, 3), np.uint8)
BOX = (1, 2, 11, 22)


def test_boxes_stand_where_words_would_name_the_class():
    assert exemplar_phrase("bolt", 2, 1) == "bolt like <region> <region> unlike <region>"
    assert exemplar_phrase("", 1, 0) == "objects like <region>"


def test_positive_boxes_come_first_in_the_order_given():
    examples = [Example(BOX, positive=False), Example((0, 0, 5, 5)), Example(BOX)]
    shown = ClassByExample(" bolt ", examples)
    assert [example.positive for example in shown.examples] == [True, True, False]
    assert shown.examples[0] is examples[1] and shown.name == "bolt"
    assert shown.phrase == "bolt like <region> <region> unlike <region>"
    assert ClassByExample("7", examples, named=False).phrase.startswith("objects like")
    assert shown.is_own and not ClassByExample("bolt", [Example(BOX, IMAGE)]).is_own


@pytest.mark.parametrize(
    ("box", "image", "message"),
    [
        ((5, 5, 5, 9), IMAGE, r"has no area; give \[x1, y1, x2, y2\]"),
        ((9, 5, 5, 9), None, "has no area"),
        ((-1, 5, 5, 9), None, "0 <= x1 < x2"),
        ((0, 0, float("nan"), 9), None, "has no area"),
        ((0, 0, float("inf"), 9), None, "has no area"),
        ("1299", IMAGE, "got '1299'"),
        ((0, 0, 61, 9), IMAGE, "outside its image of 60x40 pixels"),
        ((0, 0, 9), IMAGE, r"is \[x1, y1, x2, y2\] in pixels"),
        ("here", IMAGE, r"is \[x1, y1, x2, y2\] in pixels"),
        (BOX, IMAGE.astype(float), r"uint8 array \[height, width, 3\]"),
        (BOX, "photo.jpg", "got str"),
    ],
)
def test_an_example_that_cannot_be_is_refused_in_one_sentence(box, image, message):
    with pytest.raises(UserError, match=message) as error:
        Example(box, image)
    assert error.value.reason == "invalid_example"


@pytest.mark.parametrize(
    ("name", "examples", "message"),
    [
        ("", [Example(BOX)], "needs a name for its answers"),
        (None, [Example(BOX)], "needs a name"),
        ("bolt", [], "has no positive example"),
        ("bolt", [Example(BOX, positive=False)], "has no positive example; give 1 to 8"),
        ("bolt", [Example(BOX)] * (MOST_EXAMPLES + 1), "has 9 examples; give at most 8"),
        ("bolt", [BOX], r"are lumen_ray.Example, got \(1, 2"),
    ],
)
def test_a_class_without_usable_examples_is_refused(name, examples, message):
    with pytest.raises(UserError, match=message):
        ClassByExample(name, examples)


def test_requests_take_names_and_examples_together():
    shown = ClassByExample("bolt", [Example(BOX)])
    request = make_request("detect", classes=["nut", shown, "nut"])
    assert request.phrases == ("nut", "bolt") and request.examples == {"bolt": shown}
    assert make_request("count", classes=shown).phrases == ("bolt",)
    assert make_request("detect", classes=["bolt", shown]).phrases == ("bolt",)  # its name and its boxes
    with pytest.raises(UserError, match="'bolt' is given twice by example; give all its examples in one"):
        make_request("detect", classes=[shown, ClassByExample("bolt", [Example(BOX)])])
    with pytest.raises(UserError, match="'pose' takes classes by name only"):
        make_request("pose", classes=[shown])
    with pytest.raises(UserError, match="may not contain '<region>'"):
        make_request("detect", classes=[ClassByExample("a <region>", [Example(BOX)])])


def test_a_box_on_the_image_that_is_asked_about_lies_on_it():
    request = make_request("detect", classes=[ClassByExample("bolt", [Example((0, 0, 50, 50))])])
    check_requests((60, 60), [request])
    with pytest.raises(UserError, match="outside its image of 40x60 pixels"):
        check_requests((60, 40), [request])


def test_one_example_is_a_list_of_one_and_positive_is_true_or_false():
    assert len(ClassByExample("bolt", Example(BOX)).examples) == 1
    with pytest.raises(UserError, match="'positive' of an example is True or False, got 'no'"):
        Example(BOX, positive="no")


def test_an_image_is_hashed_once_for_all_its_boxes(monkeypatch):
    hashed, blake2b = [], exemplars.hashlib.blake2b

    def counted(data, **settings):
        hashed.append(len(data))
        return blake2b(data, **settings)

    monkeypatch.setattr(exemplars.hashlib, "blake2b", counted)
    image = np.full((50, 70, 3), 7, np.uint8)
    keys = {Example((0, 0, n + 1, 5), image).key for n in range(6)}
    assert len(keys) == 6 and sum(size > 10000 for size in hashed) == 1


def test_keys_tell_images_and_boxes_apart():
    other = IMAGE.copy()
    other[0, 0] = 1
    keys = [Example(BOX, IMAGE).key, Example(BOX, other).key, Example((1, 2, 11, 23), IMAGE).key]
    assert len(set(keys)) == 3
    assert keys[0] == Example(list(BOX), IMAGE.copy(), positive=False).key
    assert keys[0] != Example(BOX, IMAGE.reshape(60, 40, 3)).key
