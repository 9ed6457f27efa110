"""Which places learn which object, against plain loops."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen_ray.decoders.common.boxes import pairwise_iou
from lumen_ray.decoders.lumen.assigner import assign

STRIDE, SIDE = 8, 8  # a 64 px input


def naive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


boxes = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 24)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(max_examples=50, deadline=None)
@given(st.lists(boxes, min_size=1, max_size=5), st.lists(boxes, min_size=1, max_size=5))
def test_pairwise_iou_equals_the_formula(a, b):
    got = pairwise_iou(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    np.testing.assert_allclose(got, [[naive_iou(x, y) for y in b] for x in a], atol=1e-6)


def places():
    line = (torch.arange(SIDE) + 0.5) * STRIDE
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def run(gt, crowd=None, valid=None, scores=None, predicted=None, topk=9):
    """gt: one list of boxes per prompt, all of the same length."""
    gt = torch.tensor(gt, dtype=torch.float32).reshape(len(gt), -1, 4)
    prompts, count = gt.shape[:2]
    centers = places()
    if scores is None:
        scores = torch.full((prompts, len(centers)), 0.02)
    if predicted is None:  # a box of 16 px around every place
        predicted = torch.cat([centers - 8, centers + 8], -1).expand(prompts, -1, -1)
    valid = torch.ones(prompts, count, dtype=torch.bool) if valid is None else torch.tensor(valid)
    crowd = torch.zeros(prompts, count, dtype=torch.bool) if crowd is None else torch.tensor(crowd)
    return assign(scores, predicted, centers, gt, valid, crowd, topk, STRIDE)


def test_positives_lie_inside_their_object_and_are_at_most_topk():
    got = run([[[8, 8, 56, 40], [0, 40, 20, 64]]], topk=4)
    for target, box in enumerate(([8, 8, 56, 40], [0, 40, 20, 64])):
        chosen = places()[got.target[0] == target]
        assert len(chosen) == 4
        assert (chosen > torch.tensor(box[:2])).all() and (chosen < torch.tensor(box[2:])).all()
    background = got.target[0] < 0
    assert (got.quality[0][background] == 0).all() and (got.quality[0][~background] > 0).all()


def test_the_best_place_should_score_its_iou_and_the_others_less():
    got = run([[[8, 8, 32, 32]]])
    quality = got.quality[0]
    best = int(quality.argmax())
    assert places()[best].tolist() == [20, 20]  # the centre
    assert abs(float(quality[best]) - 16 * 16 / (24 * 24)) < 1e-5
    others = quality[(got.target[0] == 0) & (torch.arange(64) != best)]
    assert len(others) == 8 and (others < quality[best]).all()


def test_a_better_box_makes_a_place_win():
    predicted = torch.cat([places() - 8, places() + 8], -1)[None].clone()
    corner = int((places() == torch.tensor([12.0, 12.0])).all(-1).nonzero())
    predicted[0, corner] = torch.tensor([8.0, 8.0, 32.0, 32.0])
    got = run([[[8, 8, 32, 32]]], predicted=predicted)
    assert int(got.quality[0].argmax()) == corner and abs(float(got.quality[0, corner]) - 1) < 1e-5


def test_objects_smaller_than_a_cell_take_the_nearest_place():
    got = run([[[9, 17, 11, 19], [60, 60, 64, 64]]])
    assert places()[got.target[0] == 0].tolist() == [[12, 20]]
    assert places()[got.target[0] == 1].tolist() == [[60, 60]]


def test_a_place_claimed_by_two_objects_belongs_to_one():
    got = run([[[8, 8, 40, 40], [16, 16, 48, 48]]])
    assert {0, 1} <= set(got.target[0].tolist())
    assert got.target.shape == (1, 64)


def test_crowds_are_neither_object_nor_background():
    got = run([[[0, 0, 32, 32], [40, 40, 56, 56]]], crowd=[[True, False]])
    inside = (places() < 32).all(-1)
    assert got.ignored[0][inside].all() and not got.ignored[0][~inside].any()
    assert set(got.target[0].tolist()) == {-1, 1}
    # an object inside a crowd region is still an object
    got = run([[[0, 0, 64, 64], [40, 40, 56, 56]]], crowd=[[True, False]])
    positive = got.target[0] == 1
    assert positive.any() and not got.ignored[0][positive].any() and got.ignored[0][~positive].all()


def test_nothing_to_find():
    for got in (run([[]]), run([[[0, 0, 9, 9]]], valid=[[False]])):
        assert (got.target == -1).all() and (got.quality == 0).all() and not got.ignored.any()


def test_padding_and_other_prompts_change_nothing():
    a, b = [8, 8, 32, 32], [20, 4, 60, 60]
    alone = run([[a]])
    padded = run([[a, [0, 0, 0, 0]], [b, a]], valid=[[True, False], [True, True]])
    assert torch.equal(alone.target[0], padded.target[0]) and torch.allclose(alone.quality[0], padded.quality[0])


def test_topk_larger_than_the_map():
    got = run([[[0, 0, 64, 64]]], topk=1000)
    assert (got.target == 0).all()
