"""The pure checks that sources share."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.source_fakes import write

from lumen_ray.data.sources import record_parsing as parts
from lumen_ray.errors import UserError
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS

SIZE = (40, 60)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_reserved_tokens_are_found_anywhere(token):
    assert parts.reserved_token(f"a{token}b") == token
    with pytest.raises(UserError, match="contains the reserved token") as error:
        parts.clean_text(f"a {token}", "the text")
    assert error.value.reason == "reserved_token"


def test_allowed_tokens_may_stand_alone_but_hide_nothing():
    assert parts.clean_text(" <region> \n x", "it", allowed=("<region>",)) == "<region> x"
    with pytest.raises(UserError, match=r"reserved token \[DET\]"):
        parts.clean_text("<region>[DET]", "it", allowed=("<region>",))
    assert parts.clean_text(" a\n  b ", "it", keep_lines=True) == "a\n  b"


@given(st.text())
def test_a_clean_text_can_be_stored(text):
    try:
        clean = parts.clean_text(text, "it")
    except UserError as error:
        assert str(error).startswith("it ")
        return
    assert clean.encode().decode() == clean == " ".join(text.lstrip("\ufeff").split())


BOXES = st.lists(st.floats(-50, 120, width=32), min_size=4, max_size=4)


@given(BOXES)
def test_boxes_of_all_formats_agree(box):
    x1, y1, x2, y2 = box
    if x2 - x1 < 1e-2 or y2 - y1 < 1e-2:
        return
    found = []
    for values, name in ((box, "xyxy"), ([x1, y1, x2 - x1, y2 - y1], "xywh")):
        try:
            found.append(parts.to_box(values, name, SIZE))
        except UserError as error:
            assert "outside the image of 60x40" in str(error)
    if not found:
        assert min(x2, 60) - max(x1, 0) < 1e-3 or min(y2, 40) - max(y1, 0) < 1e-3
        return
    assert np.allclose(found, np.clip(box, 0, [60, 40, 60, 40]), atol=1e-4)


def test_boxes_that_are_none():
    for values, name, message in (
        ([1, 2, 3], "xyxy", "four finite numbers"),
        ([1, 2, float("nan"), 4], "xyxy", "four finite numbers"),
        ([1, 2, 10**400, 4], "xyxy", "four finite numbers"),
        ([5, 5, 5, 9], "xyxy", "degenerate box"),
        ([5, 5, 0, 9], "xywh", "degenerate box"),
        ([0.1, 0.1, 15, 20], "relative", "must lie in 0..1"),
        ("0 0 5 5", "xyxy", "four finite numbers"),
    ):
        with pytest.raises(UserError, match=message):
            parts.to_box(values, name, SIZE)
    assert parts.to_box([0.5, 0.25, 1, 0.5], "relative", SIZE) == [30, 10, 60, 20]


def test_a_box_without_area_is_told_apart_from_one_that_is_wrong():
    for values, name, reason in (
        ([5, 5, 5, 9], "xyxy", "empty_box"),
        ([5, 5, 0, 0], "xywh", "empty_box"),
        ([5, 5, -1, 4], "xywh", "invalid_box"),
        ([70, 5, 80, 9], "xyxy", "invalid_box"),
    ):
        with pytest.raises(UserError) as error:
            parts.to_box(values, name, SIZE)
        assert error.value.reason == reason


def test_numbers_may_be_texts():
    assert parts.to_box(["5", "5.0", "1e1", " 20 "], "xywh", SIZE) == [5, 5, 15, 25]


def test_plain_json_of_a_pickle():
    looped = [1]
    looped.append(looped)
    assert parts.plain_json({"size": (40, 60), "counts": b"abc", "more": object()}) == {
        "size": [40, 60], "counts": "abc", "more": None,
    }  # fmt: skip
    assert parts.plain_json(looped, depth=1) == [1, None]


def test_images_of_records():
    def name(record, *pattern):
        ref = parts.image_ref(record, *pattern)
        return ref and ref.name

    assert name({"image": "a/b c.jpg"}) == "a/b c.jpg"
    assert name({"image": ["x.jpg"], "image_id": 3}) == "x.jpg"
    assert name({"images": [{"path": "x.jpg"}]}) == "x.jpg"
    assert name({"images": "x.jpg", "file_name": "sub/x.jpg"}) == "sub/x.jpg"
    assert name({"image_id": 0}, "%03d.jpg") == "000.jpg"
    assert name({"image_id": "12"}, "%03d.jpg") == "012.jpg"
    assert name({"image_id": 12.0}, "%03d.jpg") == "012.jpg"
    assert name({"imageId": "n12"}, "%s.jpg") == "n12.jpg"
    for record in ({"image_id": 3}, {"image": ""}, {"images": []}, {"image": None}):
        assert name(record) is None
    for record in ({"image": 3}, {"image": ["a", "b"]}, {"image": "https://x/a.png"}, {"image": "a\0b"},
                   {"image_id": True}, {"image_id": [1]}, {"image_id": "x"}, {"image": {"bytes": "&"}}, {"image": {}},
                   {"image": "a.jpg", "images": ["b.jpg"]}, {"image": {"bytes": [1, 2]}}):  # fmt: skip
        with pytest.raises(UserError):
            parts.image_ref(record, "%03d.jpg")


def test_an_image_inside_its_record():
    data = base64.b64encode(b"pixels").decode()
    for value in ({"bytes": data}, {"bytes": data, "path": None}, f"data:image/png;base64,{data}"):
        ref = parts.image_ref({"image": value})
        assert (ref.name[:6], ref.data) == ("image-", data)
    assert parts.image_ref({"image": {"bytes": data, "path": "a.png"}}) == parts.ImageRef("a.png", data)


@pytest.mark.parametrize(
    ("value", "texts"),
    [("a  dog", ["a dog"]), (["a", " ", "b"], ["a", "b"]), ('["a", "b"]', ["a", "b"]), ("[1, 2]", ["[1, 2]"]),
     ("\ufeffred", ["red"]), (["\ufeffred", "\ufeff"], ["red"]), ("[sic] a dog", ["[sic] a dog"])],
)  # fmt: skip
def test_captions_of_a_value(value, texts):
    assert parts.caption_texts(value) == texts


@pytest.mark.parametrize("value", ["", [], [""], None, 3, ["a", 3], "[SEG]", "\ufeff"])
def test_values_that_are_no_captions(value):
    with pytest.raises(UserError, match="^the caption "):
        parts.caption_texts(value)


def test_records_of_every_layout(tmp_path):
    listed = [{"a": 1}, {"a": 2}]
    write(tmp_path, {
        "list.json": json.dumps(listed), "in.json": json.dumps({"info": {}, "data": listed}),
        "ids.json": json.dumps({"x": {"a": 1}, "y": {"a": 2}}), "lines.jsonl": '{"a": 1}\n\n{"a": 2}\n{',
        "bare.json": "3", "several.json": "{}\n{}",
    })  # fmt: skip
    load = lambda name, *keys: parts.load_records(str(tmp_path / name), keys)  # noqa: E731
    assert load("list.json") == [("list.json record 0", {"a": 1}), ("list.json record 1", {"a": 2})]
    assert [r for _, r in load("in.json", "x", "data")] == listed
    assert load("ids.json")[1] == ("ids.json record y", {"id": "y", "a": 2})
    lines = load("lines.jsonl")
    assert [r for _, r in lines[:2]] == listed
    assert lines[2][0] == "lines.jsonl line 4" and isinstance(lines[2][1], UserError)
    for name, message in (
        ("bare.json", "a list of records"),
        ("several.json", "rename"),
        ("no.json", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load(name)
