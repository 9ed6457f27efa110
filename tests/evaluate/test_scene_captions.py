"""Caption and answer metrics of the scenes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.scenes import text as scenes_text
from lumen_ray.evaluate import scene_captions as scenes_metrics
from lumen_ray.evaluate.scene_captions import caption_attributes, caption_score, vqa_answer_space


@pytest.fixture(scope="module")
def rows():
    return [scenes.scene_row(3, index) for index in range(60)]


def turns(rows, task):
    return [tuple(t["content"] for t in m["turns"]) for row in rows for m in row["messages"] if m["task"] == task]


def test_true_captions_parse_to_what_is_in_the_picture(rows):
    for row, (_, caption) in zip(rows, turns(rows, "caption"), strict=True):
        assert caption_attributes(caption) == Counter(tuple(i["phrase"].split()) for i in row["instances"])


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a red circle and two blue squares .", {("red", "circle"): 1, ("blue", "square"): 2}),
        ("red circle", {("red", "circle"): 1}),
        ("A Red circle, 3 green FIGURES", {("red", "circle"): 1, ("green", "figure"): 3}),
        ("two two red red triangles triangles", {("red", "triangle"): 2}),
        ("a red circle and a red circle", {("red", "circle"): 2}),
        ("a circle and red", {}),
        ("zero red circles", {}),
        ("blue blue ~~ [DET]", {}),
        ("", {}),
    ],
)
def test_malformed_captions_parse_to_what_can_be_read(text, items):
    assert caption_attributes(text) == items


@given(st.text())
def test_parsing_and_scoring_never_fail(text):
    assert all(count > 0 for count in caption_attributes(text).values())
    assert 0 <= caption_score(text, "a red circle .") <= 1
    vqa_answer_space(text)


@given(st.lists(st.sampled_from([*scenes.COLOURS, *scenes.SHAPES, "a", "two", "squares", "and", "."]), max_size=14))
def test_score_is_symmetric_and_one_for_itself(words):
    text, other = " ".join(words), "a red circle and two blue squares ."
    assert caption_score(text, text) == 1
    assert caption_score(text, other) == pytest.approx(caption_score(other, text))


def test_score_is_f1_over_items():
    truth = "a red circle and two blue squares ."
    assert caption_score("a red circle .", truth) == pytest.approx(2 / 3)
    assert caption_score("a red circle and a blue square .", truth) == pytest.approx(1 / 2)  # one count is wrong
    assert caption_score("a green circle .", truth) == 0
    assert caption_score("", truth) == 0


def test_chance_is_the_score_of_another_scenes_caption():
    captions = ["a red circle .", "a red circle .", "a blue square ."]
    # of the 6 ordered pairs of different scenes, 2 agree
    assert scenes_metrics.caption_attribute_chance(captions) == pytest.approx(2 / 6)
    assert scenes_metrics.caption_attribute_chance(captions[:1]) == 0


def test_chance_on_scenes_is_low_and_steady(rows):
    captions = [caption for _, caption in turns(rows, "caption")]
    assert 0.02 < scenes_metrics.caption_attribute_chance(captions) < 0.2


def test_every_question_has_an_answer_space_that_holds_its_answer(rows):
    for question, answer in turns(rows, "vqa"):
        assert answer in vqa_answer_space(question)
    assert vqa_answer_space("how many objects are there in total ?") == scenes_text.NUMBERS[1:]
    assert vqa_answer_space("how many red objects are there ?") == scenes_text.COUNT_ANSWERS
    assert vqa_answer_space("What color is the circle?") == scenes.COLOURS
    assert vqa_answer_space("why ?") == ()


def test_vqa_chance():
    pairs = [
        ("what color is the circle ?", "red"),
        ("what color is the circle ?", "red"),
        ("what color is the circle ?", "blue"),
        ("is there a red circle ?", "no"),
        ("hello", "hello"),
    ]
    chance = scenes_metrics.vqa_chance(pairs)
    assert chance["uniform"] == pytest.approx((3 / 3 + 1 / 2) / 4)
    assert chance["majority"] == pytest.approx(3 / 4)
    assert scenes_metrics.vqa_chance([]) == {"uniform": 0.0, "majority": 0.0}
