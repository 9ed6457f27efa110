import pytest

from lumen_ray.evaluate.text import (
    CaptionEvaluator,
    RegionCaptionEvaluator,
    RoutingEvaluator,
    VqaEvaluator,
    normalise,
)


def test_normalise():
    assert normalise("  Two   Circles . ") == "two circles"


def test_vqa_counts_exact_answers_and_knows_chance():
    evaluator = VqaEvaluator()
    evaluator.process("what color is the circle ?", "red", "Red .")
    evaluator.process("is there a red circle ?", "yes", "no")
    evaluator.process("is there a blue circle ?", "yes", None)
    values = evaluator.evaluate()
    assert values["vqa_accuracy"] == pytest.approx(1 / 3)
    assert values["vqa_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    evaluator.process("what breed is it ?", "poodle", "poodle")  # not enumerable: chance unknown
    assert evaluator.evaluate()["vqa_chance"] is None and evaluator.evaluate()["vqa_accuracy"] == 0.5


def test_caption_attributes_and_chance():
    evaluator = CaptionEvaluator()
    evaluator.process("a red circle and two blue squares .", "a red circle .")
    evaluator.process("a green figure .", "a green figure .")
    evaluator.process("a man rides a horse .", "a man .")  # a photograph: not scored
    values = evaluator.evaluate()
    assert values["caption_attributes"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["caption_chance"] == 0.0 and values["captions"] == 2
    assert CaptionEvaluator().evaluate()["caption_attributes"] is None


def test_region_captions_against_the_commonest_answer():
    evaluator = RegionCaptionEvaluator()
    for truth, said in (("red circle", "red circle ."), ("red circle", "blue"), ("blue square", "blue square")):
        evaluator.process(truth, said)
    values = evaluator.evaluate()
    assert values["region_caption_accuracy"] == pytest.approx(2 / 3) == values["region_caption_chance"]


def test_routing_expects_the_task_token_and_none_for_text():
    evaluator = RoutingEvaluator()
    evaluator.process("detect", "[DET]")
    evaluator.process("count", "[DET]")
    evaluator.process("segment", "[DET]")
    evaluator.process("caption", None)
    evaluator.process("vqa", "[GRD]")
    values = evaluator.evaluate()
    assert values["routing_accuracy"] == pytest.approx(3 / 5)
    assert values["routing_per_task"] == {"detect": 1, "count": 1, "segment": 0, "caption": 1, "vqa": 0}
