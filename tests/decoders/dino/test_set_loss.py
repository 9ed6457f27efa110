"""Which objects there are, which query is which, and what a wrong one costs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from support.gdino_tiny import targets_of
from transformers.loss.loss_for_object_detection import sigmoid_focal_loss

from lumen_ray.decoders.common.boxes import to_cxcywh, to_xyxy
from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.set_loss import Matches, Objects, _costs, box_loss, class_loss, find_objects, match
from lumen_ray.decoders.dino.settings import DinoLossSettings

S = DinoLossSettings()
A, B, C = [10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 50.0, 50.0], [5.0, 5.0, 25.0, 15.0]


def objects_of(targets, row, links=None, sizes=((100, 200), (50, 50))) -> Objects:
    row = torch.tensor(row)
    links = torch.arange(len(row)) if links is None else torch.tensor(links)
    return find_objects(targets, links, Seats.of(row, len(sizes)), list(sizes))


def test_objects_are_collected_by_group_in_fractions_of_the_image():
    found = objects_of(targets_of([[A], [B, C], [C]]), [1, 0, 1])
    assert found.group.tolist() == [0, 0, 1, 1] and found.counts.tolist() == [2, 2]
    xyxy = to_xyxy(found.boxes) * found.scale[found.group]
    torch.testing.assert_close(xyxy, torch.tensor([B, C, A, C]))
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.125, 0.25, 0.25, 0.5]))
    assert found.labels.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    assert found.entry[2].tolist() == [0, 0]


def test_an_object_shared_by_prompts_of_a_group_is_one_object():
    targets = targets_of([[A, B], [B], [B]], masks=True)
    targets.instance = torch.tensor([[7, 3], [3, -1], [3, -1]])
    targets.mask_index[0, 1] = -1  # the second prompt alone knows its mask
    found = objects_of(targets, [0, 0, 1])
    assert found.group.tolist() == [0, 0, 1]
    assert found.labels.tolist() == [[1, 1], [1, 0], [1, 0]]
    assert found.mask.tolist() == [2, 0, 3]
    assert found.entry.tolist() == [[0, 1], [0, 0], [2, 0]]


def test_crowds_and_prompts_without_detection_targets_have_no_objects():
    targets = targets_of([[A], [B], [C]])
    targets.crowd[0, 0], targets.counted[1] = True, False
    found = objects_of(targets, [0, 0, 1])
    assert found.group.tolist() == [1]
    assert found.counted.tolist() == [[True, False], [True, False]]
    links = objects_of(targets_of([[A], [B], [C]]), [0, 1], links=[0, 2])  # the second is a keypoint prompt
    torch.testing.assert_close(to_xyxy(links.boxes) * links.scale[links.group], torch.tensor([A, C]))


def stage_of(groups: int, queries: int, prompts: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(groups, queries, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    return SimpleNamespace(
        logits=torch.randn(groups, queries, prompts, generator=generator), boxes=to_cxcywh(corners[..., [0, 1, 2, 3]])
    )


def test_the_assignment_is_the_cheapest_of_all():
    objects = objects_of(targets_of([[A], [B, C], [C]]), [1, 0, 1])
    stage = stage_of(2, 4, 2)
    (found,) = match([stage], torch.ones(2, 4, dtype=torch.bool), objects, S)
    costs = _costs(stage, objects, S)
    for group in range(2):
        own = found.group == group
        chosen = dict(zip(found.object[own].tolist(), found.query[own].tolist(), strict=True))
        members = torch.nonzero(objects.group == group).flatten().tolist()
        best = min(
            itertools.permutations(range(4), len(members)),
            key=lambda queries, g=group: sum(float(costs[g, q, i]) for i, q in enumerate(queries)),
        )
        assert [chosen[m] for m in members] == list(best)


def test_costs_are_those_of_deformable_detr():
    objects = objects_of(targets_of([[A]]), [0], sizes=((100, 100),))
    stage = stage_of(1, 3, 1)
    p, box = stage.logits[0, :, 0].sigmoid(), torch.tensor([0.2, 0.4, 0.2, 0.4])
    kind = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    l1 = (stage.boxes[0] - box).abs().sum(-1)
    x, y = to_xyxy(stage.boxes[0]), to_xyxy(box)
    overlap = (torch.minimum(x[:, 2:], y[2:]) - torch.maximum(x[:, :2], y[:2])).clamp_min(0).prod(-1)
    union = (x[:, 2:] - x[:, :2]).prod(-1) + (y[2:] - y[:2]).prod() - overlap
    hull = (torch.maximum(x[:, 2:], y[2:]) - torch.minimum(x[:, :2], y[:2])).prod(-1)
    wanted = 2 * kind + 5 * l1 + 2 * (1 - overlap / union + (hull - union) / hull)
    torch.testing.assert_close(_costs(stage, objects, S)[0, :, 0], wanted, rtol=1e-4, atol=1e-4)


def test_more_objects_than_queries_and_unused_queries():
    objects = objects_of(targets_of([[A, B, C], [A]]), [0, 1])
    valid = torch.tensor([[True, True], [False, False]])
    (found,) = match([stage_of(2, 2, 1)], valid, objects, S)
    assert found.group.tolist() == [0, 0] and sorted(found.query.tolist()) == [0, 1]


@pytest.mark.parametrize(("queries", "most"), [(8, 3), (4, 2), (2, 1)])
def test_layers_but_the_last_match_an_object_to_several_queries(queries, most):
    objects = objects_of(targets_of([[A, B], [A]]), [0, 1])
    settings = S.model_copy(update={"auxiliary_matches": 3})
    stages = [stage_of(2, queries, 1)] * 2
    first, last = match(stages, torch.ones(2, queries, dtype=torch.bool), objects, settings)
    assert first.object.bincount().tolist() == [most, most, min(3, queries)]
    assert last.object.bincount().tolist() == [1, 1, 1]
    places = list(zip(first.group.tolist(), first.query.tolist(), strict=True))
    assert len(set(places)) == len(places)


def test_losses_that_are_no_numbers_do_not_stop_the_matching():
    objects = objects_of(targets_of([[A], [B]]), [0, 1])
    stage = stage_of(2, 3, 1)
    stage.logits[0], stage.boxes[1] = float("nan"), float("nan")
    (found,) = match([stage], torch.ones(2, 3, dtype=torch.bool), objects, S)
    assert len(found.group) == 2
    assert box_loss(stage, found, objects, S).isnan().any()


def test_the_class_loss_is_the_focal_loss_of_counted_prompts():
    objects = objects_of(targets_of([[A], [B], [C]]), [0, 0, 1])
    objects.counted[0, 1] = False
    stage = stage_of(2, 3, 2)
    stage.logits[1, :, 1] = float("-inf")
    matches = Matches(torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0, 2]))
    weight = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.5]])
    loss = class_loss(stage, matches, objects, weight)
    for group, query in ((0, 2), (1, 1)):
        wanted = torch.zeros(3, 1)
        wanted[query] = 1
        # the library divides by the number of boxes, and takes the mean over classes
        each = [
            sigmoid_focal_loss(stage.logits[group, q : q + 1, :1], wanted[q : q + 1], 1) * weight[group, q]
            for q in range(3)
        ]
        torch.testing.assert_close(loss[group, 0], sum(each))
    assert loss[:, 1].tolist() == [0, 0] and loss.isfinite().all()


@pytest.mark.parametrize("size", [(100, 100), (50, 200)])
def test_the_box_loss_of_a_perfect_box_is_zero_and_giou_does_not_see_the_shape_of_the_image(size):
    objects = objects_of(targets_of([[A]]), [0], sizes=(size,))
    matches = Matches(*torch.zeros(3, 1, dtype=torch.int64))
    stage = SimpleNamespace(logits=None, boxes=objects.boxes[None].clone())
    assert box_loss(stage, matches, objects, S).item() == pytest.approx(0, abs=1e-6)
    height, width = size
    stage.boxes[0, 0, 0] += 20 / width  # to the right by its own width
    # side by side: IoU 0, nothing of the hull is neither
    assert box_loss(stage, matches, objects, S).item() == pytest.approx(5 * 20 / width + 2, abs=1e-4)
