"""The best instances of an answer over all its phrases."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.answer import Answer
from lumen_ray.structures import Boxes, Masks, Prediction

SCORES = st.lists(st.lists(st.floats(0, 1, width=32), max_size=6), max_size=6)


def answer_of(scores):
    parts = []
    for i, mine in enumerate(scores):
        boxes = Boxes(np.arange(4 * len(mine)).reshape(-1, 4) + i, (9, 9))
        masks = Masks.from_arrays(np.ones((len(mine), 9, 9), bool), (9, 9))
        parts.append(Prediction(f"p{i}", boxes, sorted(mine, reverse=True), masks))
    return Answer("segment", (9, 9), parts, route="[SEG]")


@given(SCORES, st.integers(0, 40))
def test_the_best_are_kept_with_every_phrase_in_place(scores, most):
    answer = answer_of(scores)
    best = answer.best(most)
    assert [p.phrase for p in best.predictions] == [p.phrase for p in answer.predictions]
    assert (best.task, best.size, best.route) == (answer.task, answer.size, answer.route)
    everything = sorted((s for mine in scores for s in mine), reverse=True)
    assert sorted((float(s) for p in best.predictions for s in p.scores), reverse=True) == everything[:most]
    for p, whole in zip(best.predictions, answer.predictions, strict=True):
        assert np.array_equal(p.scores, whole.scores[: len(p)])
        assert np.array_equal(p.boxes.xyxy, whole.boxes.xyxy[: len(p)])
        assert len(p.masks) == len(p)
