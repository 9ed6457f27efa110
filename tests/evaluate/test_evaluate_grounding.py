import numpy as np
import pytest

from lumen_ray.answer import Answer
from lumen_ray.data.shards.schema import make_row
from lumen_ray.evaluate.grounding import CountEvaluator, GroundEvaluator, ReferEvaluator, match_count
from lumen_ray.structures import Boxes, Prediction

SIZE = (100, 100)
A, B, C = [0, 0, 20, 20], [40, 40, 60, 60], [70, 70, 90, 90]


def row(*boxes, phrase="cat", crowd=False):
    instances = [
        {"phrase": phrase, "box": b, "mask": None, "keypoints": None, "crowd": crowd, "area": 400} for b in boxes
    ]
    return make_row("a", b"", SIZE, "test", classes=["cat", "dog"], instances=instances)


def found(*pairs, phrase="cat"):
    return Prediction(phrase, Boxes([b for b, _ in pairs], SIZE), [s for _, s in pairs])


def test_two_predictions_cannot_share_one_object():
    assert match_count(found((A, 0.9), (A, 0.8)), Boxes([A, B], SIZE)) == 1
    assert match_count(found((A, 0.9), (B, 0.8)), Boxes([A, B], SIZE)) == 2
    assert match_count(found((A, 0.9)), Boxes([], SIZE)) == 0


def test_refer_scores_the_best_box_and_absence_apart():
    evaluator = ReferEvaluator()
    answers = [
        ([0], found((B, 0.4), (A, 0.9))),  # right, though the best is not first
        ([0], found((B, 0.9), (A, 0.4))),  # wrong: another object is preferred
        ([1], found()),  # says nothing fits, wrongly
        ([], found((A, 0.1))),  # nothing fits and nothing scores: right
        ([], found((A, 0.8))),  # claims an object that is not there
    ]
    for instances, prediction in answers:
        evaluator.process(row(A, B), instances, Answer("refer", SIZE, [prediction]))
    values = evaluator.evaluate()
    assert values["refer_p50"] == pytest.approx(1 / 3)
    assert values["refer_no_target_accuracy"] == pytest.approx(1 / 2)
    assert values["refer_target_accuracy"] == pytest.approx(2 / 3)
    assert values["refer_expressions"] == 5
    evaluator.reset()
    assert evaluator.evaluate()["refer_p50"] is None


def test_ground_over_phrases_and_over_boxes():
    evaluator = GroundEvaluator()
    evaluator.process(row(A, B), [0, 1], found((A, 0.9), (C, 0.5), (B, 0.1)))  # B is below the threshold
    evaluator.process(row(A, B), [], found((C, 0.9)))
    values = evaluator.evaluate()
    assert values["ground_p50"] == 1.0 and values["ground_phrases"] == 2
    assert values["ground_recall50"] == pytest.approx(1 / 2)
    assert values["ground_precision50"] == pytest.approx(1 / 3)
    assert values["ground_f1"] == pytest.approx(2 / 5)


def test_count_keeps_absent_classes_apart_and_leaves_crowds_out():
    evaluator = CountEvaluator()
    evaluator.process(row(A, B), Answer("count", SIZE, [found((A, 0.9), (B, 0.2)), found(phrase="dog")]))
    evaluator.process(row(A, B), Answer("count", SIZE, [found((A, 0.9), (B, 0.5)), found((C, 0.9), phrase="dog")]))
    evaluator.process(row(A, crowd=True), Answer("count", SIZE, [found((A, 0.9), (B, 0.9))]))
    assert evaluator.evaluate() == {"count_error": 0.5, "count_accuracy": 0.5, "count_absent_accuracy": 0.5}


def test_counts_over_a_long_list_of_classes_leave_out_what_nobody_counted():
    names = [f"class {i}" for i in range(1200)]
    instances = [{"phrase": names[i], "crowd": i == 2} for i in (0, 0, 1, 2, 1199)]
    row = {"height": 8, "width": 8, "classes": names[:1199], "instances": instances}
    found = {names[0]: 2, names[1]: 3, names[2]: 9, names[7]: 1, names[1199]: 5}
    predictions = [
        Prediction(name, Boxes(np.zeros((found.get(name, 0), 4)), (8, 8)), np.ones(found.get(name, 0)))
        for name in names
    ]
    evaluator = CountEvaluator()
    evaluator.process(row, Answer("count", (8, 8), predictions))
    metrics = evaluator.evaluate()
    assert metrics["count_error"] == pytest.approx(1.0)  # 2 of 2, and 3 of 1
    assert metrics["count_absent_accuracy"] == pytest.approx(1195 / 1196)
