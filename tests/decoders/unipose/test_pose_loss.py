"""Targets and losses of slots against values computed by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.unipose_tiny import pose_link, pose_targets

from lumen_ray.decoders.dino.decoder import Groups
from lumen_ray.decoders.unipose.pose_loss import find_poses, match_poses, object_similarity, pose_losses
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.decoders.unipose.slots import Skeletons, Slots
from lumen_ray.targets import PerceptionTargets, Pixels

SETTINGS = UniPoseSettings()
BOX = [10.0, 10.0, 30.0, 50.0]


def case(points: list[list[list[float]]], boxes: list[list[float]] | None = None):
    """One image of 100 x 50 pixels, one prompt with two keypoints; `points` (x, y, v) of both in every instance."""
    link = pose_link([[2]])
    pixels = Pixels(torch.zeros(1, 3, 100, 50, dtype=torch.uint8), torch.tensor([[100, 50]]))
    groups = Groups.of(link, pixels)
    skeletons = Skeletons.of(link, groups.objects)
    boxes = boxes or [BOX] * len(points)
    per_link = [[[0.0] * 3] * len(points), [p[0] for p in points], [p[1] for p in points]]
    targets = pose_targets(link, [boxes] * 3, per_link)
    return groups, find_poses(targets, groups, skeletons)


def slots_of(seats: list[list[int]], groups: Groups) -> Slots:
    seat = torch.tensor(seats)
    return Slots.at(torch.zeros_like(seat), seat, groups, torch.ones_like(seat, dtype=torch.bool))


def stage_at(objects, order: list[int], moved: float = 0.0):
    """Slots at the objects, keypoints moved by `moved` pixels to the right."""
    xy = objects.xy[order] + torch.tensor([moved / 50, 0.0])
    visible = torch.zeros(1, len(order), objects.xy.shape[1])
    return SimpleNamespace(
        logits=torch.zeros(1, len(order)), boxes=objects.boxes[order][None], xy=xy[None], visible=visible
    )


def test_oks_is_cocos():
    """As `pycocotools` computes it; in pixels, so the same whatever the image's shape."""
    rng = np.random.default_rng(0)
    found, wanted = rng.uniform(0, 60, (2, 5, 2))
    sigma, labelled, area = np.array([0.025, 0.1, 0.05, 0.07, 0.03]), np.array([1, 1, 0, 1, 1], bool), 1700.0
    e = ((found - wanted) ** 2).sum(1) / (2 * sigma) ** 2 / area / 2
    expected = np.exp(-e)[labelled].mean()
    distance = torch.tensor(((found - wanted) ** 2).sum(1))
    got = object_similarity(distance, torch.tensor(labelled), torch.tensor(sigma), torch.tensor(area))
    assert abs(float(got) - expected) < 1e-6


def test_losses_of_keypoints_by_hand():
    groups, objects = case([[[20.0, 20.0, 2.0], [25.0, 40.0, 0.0]]])
    stage, slots = stage_at(objects, [0], moved=3.0), slots_of([[0]], groups)
    matches = match_poses(stage, slots, objects, SETTINGS)
    assert [v.tolist() for v in matches] == [[0], [0], [0]]
    kinds, sums = pose_losses(stage, slots, matches, objects, torch.tensor([[True]]), SETTINGS)
    assert sums["unipose_keypoint"].item() == pytest.approx(10 * 3 / 50, rel=1e-5)  # one labelled keypoint
    oks = np.exp(-(3**2) / (2 * 20 * 40 * 0.1**2))
    assert sums["unipose_oks"].item() == pytest.approx(4 * (1 - oks), rel=1e-4)
    assert sums["unipose_visible"].item() == pytest.approx(np.log(2), rel=1e-5)  # the mean of both keypoints
    assert sums["unipose_box"].item() == pytest.approx(0, abs=1e-4)
    assert kinds.item() == pytest.approx(2 * 0.25 * 0.25 * np.log(2), rel=1e-5)


def test_sigmas_come_with_the_targets():
    groups, objects = case([[[20.0, 20.0, 2.0], [25.0, 40.0, 2.0]]])
    assert torch.equal(objects.sigma, torch.full((1, 2), 0.05))
    link = pose_link([[2]])
    targets = pose_targets(link, [[BOX]] * 3, [[[0.0] * 3]] * 3)
    targets = PerceptionTargets(**vars(targets) | {"sigma": torch.tensor([0.05, 0.1, 0.02])})
    skeletons = Skeletons.of(link, groups.objects)
    torch.testing.assert_close(find_poses(targets, groups, skeletons).sigma, torch.tensor([[0.1, 0.02]]))


def test_objects_are_matched_by_their_keypoints_where_boxes_agree():
    points = [[[12.0, 12.0, 2.0], [28.0, 12.0, 2.0]], [[12.0, 48.0, 2.0], [28.0, 48.0, 2.0]]]
    groups, objects = case(points)
    stage, slots = stage_at(objects, [1, 0]), slots_of([[0, 0]], groups)
    _, slot, index = match_poses(stage, slots, objects, SETTINGS)
    assert sorted(zip(slot.tolist(), index.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_unlabelled_instances_train_neither_position_nor_visibility():
    groups, objects = case([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    stage, slots = stage_at(objects, [0], moved=9.0), slots_of([[0]], groups)
    matches = match_poses(stage, slots, objects, SETTINGS)
    _, sums = pose_losses(stage, slots, matches, objects, torch.tensor([[True]]), SETTINGS)
    assert all(sums[f"unipose_{name}"] == 0 for name in ("keypoint", "oks", "visible"))


def test_slots_of_another_prompt_or_out_of_use_get_no_object():
    link = pose_link([[2, 1]])
    pixels = Pixels(torch.zeros(1, 3, 100, 50, dtype=torch.uint8), torch.tensor([[100, 50]]))
    groups = Groups.of(link, pixels)
    keypoint = [[20.0, 20.0, 2.0]]
    targets = pose_targets(link, [[BOX]] * 3 + [[]] * 2, [[[0.0] * 3], keypoint, keypoint, [], []])
    objects = find_poses(targets, groups, Skeletons.of(link, groups.objects))
    assert len(objects) == 1 and objects.exists.tolist() == [[True, True]]
    slots = slots_of([[1, 0, 0]], groups)
    slots.valid[0, 1] = False
    stage = stage_at(objects, [0, 0, 0])
    assert match_poses(stage, slots, objects, SETTINGS).query.tolist() == [2]
    counted = torch.tensor([[True, True]])
    matches = match_poses(stage, slots, objects, SETTINGS)
    kinds, _ = pose_losses(stage, slots, matches, objects, counted, SETTINGS)
    assert kinds[0, 0].item() == pytest.approx(2 * 0.25 * 0.25 * np.log(2))  # not that of the slot out of use
    assert kinds[0, 1].item() == pytest.approx(2 * 0.75 * 0.25 * np.log(2))
    slots.valid[:] = False
    assert len(match_poses(stage, slots, objects, SETTINGS).query) == 0


def test_an_object_that_two_prompts_name_has_the_keypoints_of_both():
    link = pose_link([[1, 2]])
    pixels = Pixels(torch.zeros(1, 3, 100, 50, dtype=torch.uint8), torch.tensor([[100, 50]]))
    groups = Groups.of(link, pixels)
    points = [[[0.0] * 3], [[11.0, 11.0, 2.0]], [[0.0] * 3], [[25.0, 20.0, 1.0]], [[25.0, 40.0, 2.0]]]
    objects = find_poses(pose_targets(link, [[BOX]] * 5, points), groups, Skeletons.of(link, groups.objects))
    assert objects.seat.tolist() == [0, 1] and torch.equal(objects.boxes[0], objects.boxes[1])
    torch.testing.assert_close(objects.xy[0, 0], torch.tensor([11 / 50, 11 / 100]))
    assert objects.exists.tolist() == [[True, False], [True, True]]
    assert objects.labelled.tolist() == [[True, False], [True, True]]
    assert objects.visible.tolist() == [[True, False], [False, True]]


def test_a_loss_that_is_no_number_does_not_stop_the_matching():
    groups, objects = case([[[20.0, 20.0, 2.0], [25.0, 40.0, 2.0]]])
    stage, slots = stage_at(objects, [0, 0]), slots_of([[0, 0]], groups)
    stage.xy[0, 0] = float("nan")
    assert match_poses(stage, slots, objects, SETTINGS).query.tolist() == [1]
