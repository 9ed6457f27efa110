"""cgF1 and its parts against their definitions written out, with matchings tried one by one."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.detections import SIZE, answer, row

from lumen_ray.evaluate.concepts import IOUS, ConceptEvaluator
from lumen_ray.structures import Masks

boxes = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(5, 20), st.integers(5, 20)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
pairs = st.lists(st.tuples(st.lists(boxes, max_size=3), st.lists(st.tuples(boxes, st.floats(0, 1)), max_size=3)),
                 min_size=1, max_size=6)  # fmt: skip


def iou(a, b):
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    overlap = max(w, 0) * max(h, 0)
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(area) - overlap)


def best_matching(found, truth):
    """The IoUs of the matching with the largest sum."""
    few, many = sorted((found, truth), key=len)
    tried = [[iou(a, b) for a, b in zip(few, order, strict=True)] for order in permutations(many, len(few))]
    return max(tried, key=sum)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_as_defined(cases):
    evaluator = ConceptEvaluator("bbox", threshold=0.5)
    tp, fp, fn = np.zeros(10), np.zeros(10), np.zeros(10)
    local, table = [], np.zeros((2, 2))
    for truth, found in cases:
        evaluator.process(row(truth), answer(found))
        claimed = [box for box, score in found if np.float32(score) >= 0.5]
        table[int(bool(truth)), int(bool(claimed))] += 1
        if not truth:
            continue
        hits = np.array([sum(v >= t - 1e-9 for v in best_matching(claimed, truth)) for t in IOUS])
        tp, fp, fn = tp + hits, fp + len(claimed) - hits, fn + len(truth) - hits
        if claimed:
            local.append(2 * hits / (len(claimed) + len(truth)))
    (tn, false_claims), (missed, right) = table
    metrics = evaluator.evaluate()
    if tn + false_claims == 0 or missed + right == 0:
        assert metrics["IL_MCC"] is None and metrics["cgF1"] is None
    else:
        product = (right + false_claims) * (right + missed) * (tn + false_claims) * (tn + missed)
        mcc = (right * tn - false_claims * missed) / np.sqrt(product) if product else 0.0
        assert metrics["IL_MCC"] == pytest.approx(mcc, abs=1e-9)
        assert metrics["cgF1"] == pytest.approx(mcc * (2 * tp / (2 * tp + fp + fn)).mean(), abs=1e-9)
    if missed + right:
        assert metrics["pmF1"] == pytest.approx((2 * tp / (2 * tp + fp + fn)).mean(), abs=1e-9)
    assert metrics["pMF1"] == (pytest.approx(np.mean(local), abs=1e-9) if local else None)


def test_pairs_with_unknown_instances_are_left_out():
    evaluator = ConceptEvaluator("bbox")
    found = [([0, 0, 9, 9], 0.9)]
    evaluator.process(row([[0, 0, 9, 9]]) | {"classes": []}, answer(found))
    crowd = row([[0, 0, 9, 9]])
    crowd["instances"][0]["crowd"] = True
    evaluator.process(crowd, answer(found))
    masked = ConceptEvaluator("segm")
    masked.process(row([[0, 0, 9, 9]]), answer([]))
    for metrics in (evaluator.evaluate(), masked.evaluate()):
        assert set(metrics.values()) == {None}


def test_masks_are_matched_by_their_own_iou():
    half, whole = np.zeros((2, *SIZE), np.uint8)
    half[:10, :20], whole[:20, :20] = 1, 1
    (true_mask,) = Masks.from_arrays(whole[None]).rles
    truth = row([[0, 0, 20, 20]])
    truth["instances"][0]["mask"] = true_mask
    found = answer([([0, 0, 20, 20], 0.9)], task="segment", masks=Masks.from_arrays(half[None]))
    evaluator = ConceptEvaluator("segm")
    evaluator.process(truth, found)
    assert evaluator.evaluate()["pmF1"] == pytest.approx(0.1)  # IoU 0.5: right at the first of ten thresholds
