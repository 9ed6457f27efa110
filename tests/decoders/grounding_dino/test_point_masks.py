"""Mask losses on points, and maps at the size of the stored image."""

from __future__ import annotations

import pytest
import torch

from lumen_ray.decoders.common.upsample import at_stored_size
from lumen_ray.decoders.grounding_dino.point_masks import at_points, choose_points, mask_losses
from lumen_ray.targets import Frame


def test_points_read_cells_by_their_centres():
    maps = torch.arange(12.0).view(1, 3, 4)
    points = torch.tensor([[[2.0, 2.0], [4.0, 2.0], [14.0, 10.0], [14.0, 6.0]]])
    assert at_points(maps, points, 4)[0].tolist() == pytest.approx([0, 0.5, 11, 7], abs=1e-4)


def test_most_points_are_where_the_mask_is_unsure_and_all_are_in_the_image():
    torch.manual_seed(0)
    logits = (torch.arange(20.0) * 4 + 2 - 40).expand(1, 20, 20).contiguous()  # the border is at x = 40
    points = choose_points(logits, torch.tensor([[60.0, 30.0]]), 400, 4)[0]
    assert points.shape == (400, 2) and (points >= 2).all() and (points <= torch.tensor([58.0, 30.0])).all()
    near = (points[:, 0] - 40).abs() < 10
    assert near.float().mean() > 0.75  # of points drawn at random it is a third


def test_losses_of_masks_that_are_right_and_wrong():
    torch.manual_seed(0)
    wanted = torch.zeros(2, 16, 16, dtype=torch.uint8)
    wanted[:, 4:12, 4:12] = 1
    logits = (wanted.float() * 2 - 1) * torch.tensor([30.0, -30.0])[:, None, None]
    bce, dice = mask_losses(logits, wanted, torch.full((2, 2), 64.0), 300, 4)
    assert bce[0] < 1 and dice[0] < 0.25
    assert bce[1] > 5 and dice[1] > 0.8


def test_the_loss_ignores_padding():
    torch.manual_seed(0)
    wanted = torch.ones(1, 8, 8, dtype=torch.uint8)
    logits = torch.full((1, 8, 8), 20.0)
    logits[:, :, 4:] = -20.0
    bce, _ = mask_losses(logits, wanted, torch.tensor([[14.0, 32.0]]), 200, 4)
    assert bce.item() < 1e-3


def test_with_as_many_points_as_cells_every_cell_counts_once_and_padding_not():
    wanted = torch.ones(1, 8, 8, dtype=torch.uint8)
    logits = torch.full((1, 8, 8), 20.0)
    logits[:, :, 4:] = -20.0
    bce, dice = mask_losses(logits, wanted, torch.tensor([[14.0, 32.0]]), 64, 4)
    assert bce.item() < 1e-3 and dice.item() < 1e-3
    bce, _ = mask_losses(logits, wanted, torch.tensor([[20.0, 32.0]]), 64, 4)
    assert bce.item() == pytest.approx(20 / 5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_map_at_the_stored_size(scale):
    values = torch.zeros(6, 8)
    values[2:4, 2:6] = 1  # y 8..16, x 8..24 of the input
    frame = Frame((round(24 / scale), round(30 / scale)), scale, (32, 32))
    full = at_stored_size(values, 4, frame) > 0.5
    assert full.shape == frame.size
    wanted = torch.zeros(frame.size, dtype=torch.bool)
    wanted[round(8 / scale) : round(16 / scale), round(8 / scale) : round(24 / scale)] = True
    row, column = round(12 / scale), round(16 / scale)  # corners are rounded
    assert torch.equal(full[row], wanted[row]) and torch.equal(full[:, column], wanted[:, column])
    assert (full != wanted).float().mean() < 0.05


def test_a_map_that_rounding_left_short_covers_the_image_all_the_same():
    assert at_stored_size(torch.ones(2, 3), 4, Frame((85, 121), 0.1, (12, 12))).shape == (85, 121)
