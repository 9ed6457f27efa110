"""Expected calibration error and reliability diagrams."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.detections import answer, row

from lumen_ray.evaluate.calibration import LEAST_SCORE, CalibrationEvaluator, Reliability, draw_reliability


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 15))
def test_the_error_is_the_mean_gap_of_bins_by_their_size(instances, bins):
    scores, hits = (np.array(values) for values in zip(*instances, strict=True))
    expected = 0.0
    for n in range(bins):
        inside = (scores * bins >= n) & ((scores * bins < n + 1) | (n == bins - 1))
        if inside.any():
            expected += inside.mean() * abs(scores[inside].mean() - hits[inside].mean())
    assert Reliability.of(scores, hits, bins).error == pytest.approx(expected, abs=1e-9)


def test_scores_that_are_frequencies_have_no_error():
    rng = np.random.default_rng(0)
    scores = rng.random(200_000)
    assert Reliability.of(scores, rng.random(200_000) < scores).error < 0.01
    assert Reliability.of(scores**2, rng.random(200_000) < scores).error > 0.1
    assert Reliability.of(np.zeros(0), np.zeros(0, bool)).error is None


def test_an_object_is_found_once_by_the_best_instance():
    evaluator = CalibrationEvaluator("bbox")
    box, other = [0, 0, 20, 20], [20, 20, 40, 40]
    found = [(box, 0.6), (box, 0.9), (other, 0.7), (box, LEAST_SCORE / 2)]
    evaluator.process(row([box]), answer(found))
    evaluator.process(row([], phrase="dog"), answer([(box, 0.3)], phrase="dog"))
    scores, hits, phrases = evaluator.instances
    assert scores == pytest.approx([0.6, 0.9, 0.7, 0.3], abs=1e-6)
    assert (hits.tolist(), phrases.tolist()) == ([False, True, False, False], ["cat"] * 3 + ["dog"])
    assert evaluator.evaluate()["ECE"] == pytest.approx((0.6 + 0.1 + 0.7 + 0.3) / 4, abs=1e-6)
    evaluator.process(row([box]) | {"classes": []}, answer(found))
    assert len(evaluator.instances[0]) == 4


def test_the_picture_has_a_diagram_per_task(tmp_path):
    diagram = Reliability.of(np.array([0.1, 0.9, 0.95]), np.array([False, True, True]))
    draw_reliability({"detect": diagram, "segment": diagram}, tmp_path / "reliability.png")
    with Image.open(tmp_path / "reliability.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 2 * pixels.shape[0]
    left, right = np.split(pixels, 2, axis=1)
    assert (left == [0x6D, 0x9E, 0xEB]).all(-1).sum() > 4000
    assert (left == right)[60:300].mean() > 0.99  # but for the titles
