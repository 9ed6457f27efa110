"""Keypoints of boxes: rows do not touch each other, and the soft argmax can reach every place of the window."""

import torch
from support.tiny_models import scrambled

from lumen_ray.decoders.lumen.pose_head import MARGIN, PoseHead, unique_rows

BOXES = torch.tensor([[4.0, 8, 30, 50], [20, 4, 60, 24], [4, 8, 30, 50], [0, 0, 64, 64]])
IMAGES = torch.tensor([1, 0, 1, 0])


def head():
    return scrambled(PoseHead(dense_channels=6, link_channels=10, channels=8, grid=6), 0.3)


def inputs():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 6, 16, 16, generator=generator)
    return dense, BOXES, IMAGES, torch.randn(4, 10, generator=generator)


@torch.no_grad()
def test_rows_do_not_depend_on_each_other_or_on_their_order():
    pose = head()
    dense, boxes, images, links = inputs()
    xy, visible = pose(dense, boxes, images, links)
    assert xy.shape == (4, 2) and visible.shape == (4,)
    order = torch.tensor([2, 0, 3, 1])
    shuffled, shuffled_visible = pose(dense, boxes[order], images[order], links[order])
    torch.testing.assert_close(shuffled, xy[order])
    torch.testing.assert_close(shuffled_visible, visible[order])
    for i in range(4):
        image = int(images[i])
        alone = pose(dense[image : image + 1], boxes[i : i + 1], torch.zeros(1, dtype=torch.int64), links[i : i + 1])
        torch.testing.assert_close(alone[0][0], xy[i])
        torch.testing.assert_close(alone[1][0], visible[i])
    assert (xy[0] - xy[2]).abs().max() > 1e-3  # the same box, another keypoint name


@torch.no_grad()
def test_keypoints_stay_in_the_enlarged_box_and_move_with_it():
    pose = head()
    dense, boxes, images, links = inputs()
    xy, _ = pose(dense, boxes, images, links)
    reach = (boxes[:, 2:] - boxes[:, :2]) * MARGIN * 0.6  # half the window and the learned tenth
    assert ((xy - (boxes[:, :2] + boxes[:, 2:]) / 2).abs() <= reach).all()
    # a map and a box shifted together by 4 places
    shifted = torch.zeros(2, 6, 24, 24)
    shifted[:, :, 4:20, 4:20] = dense
    inner = torch.tensor([[16.0, 16, 44, 40]])  # its window lies inside the map
    before, _ = pose(dense, inner, IMAGES[:1], links[:1])
    after, _ = pose(shifted, inner + 16, IMAGES[:1], links[:1])
    torch.testing.assert_close(after, before + 16, atol=1e-3, rtol=1e-3)


def test_no_instances_give_nothing():
    dense, boxes, images, links = inputs()
    xy, visible = head()(dense, boxes[:0], images[:0], links[:0])
    assert xy.shape == (0, 2) and visible.shape == (0,)


def test_a_degenerate_box_gives_numbers_and_gradients():
    dense, _, _, links = inputs()
    dense.requires_grad_()
    xy, visible = head()(dense, torch.tensor([[10.0, 10, 10, 10]]), torch.tensor([1]), links[:1])
    (xy.sum() + visible.sum()).backward()
    assert xy.isfinite().all() and dense.grad.isfinite().all() and dense.grad[0].abs().sum() == 0


def test_it_learns_a_place_that_the_features_mark():
    """One channel marks the keypoint; boxes vary."""
    torch.manual_seed(0)
    pose = PoseHead(2, 4, 8, grid=8)
    optimizer = torch.optim.Adam(pose.parameters(), lr=1e-2)
    links = torch.ones(16, 4)
    for _ in range(120):
        center = torch.rand(16, 2) * 32 + 16
        target = center + (torch.rand(16, 2) - 0.5) * 16
        place = (torch.arange(16) + 0.5) * 4
        bump = torch.exp(
            -((place - target[:, :1]) ** 2)[:, None, :] / 32 - ((place - target[:, 1:]) ** 2)[:, :, None] / 32
        )
        dense = torch.stack([bump, torch.ones_like(bump)], 1)
        xy, _ = pose(dense, torch.cat([center - 12, center + 12], 1), torch.arange(16), links)
        loss = (xy - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5  # pixels; 4 where the box's centre is the answer


def test_unique_rows():
    rows = torch.tensor([[1.0, 2], [0, 0], [1, 2], [0, 1]])
    unique, first, inverse = unique_rows(rows)
    assert torch.equal(unique[inverse], rows) and torch.equal(rows[first], unique)
    assert sorted(first.tolist()) == [0, 1, 3]
