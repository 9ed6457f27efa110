"""Deformable attention on one sheet gives what the library's gives level by level."""

from __future__ import annotations

import pytest
import torch
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoMultiscaleDeformableAttention

from lumen_ray.decoders.dino.deformable import DeformableAttention, Grid
from lumen_ray.decoders.dino.settings import DinoSettings
from lumen_ray.decoders.dino.transformer import library_config

SHAPES = [(3, 9), (5, 4), (2, 2), (1, 1)]  # a level need not be smaller than the one before
PLACES = sum(rows * columns for rows, columns in SHAPES)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_values_and_gradients_are_the_librarys(coordinates, masked):
    config = library_config(DinoSettings(hidden_size=32, num_heads=4, encoder_ffn=64))
    torch.manual_seed(0)
    theirs = GroundingDinoMultiscaleDeformableAttention(config, 4, 4)
    ours = DeformableAttention(config, 4, 4)
    torch.nn.init.normal_(theirs.sampling_offsets.bias, std=2.0)  # many fall between levels, or outside
    ours.load_state_dict(theirs.state_dict())
    queries, values = torch.randn(2, 30, 32), torch.randn(2, PLACES, 32)
    reference = torch.rand(2, 30, 4, coordinates) * 1.4 - 0.2
    mask = torch.rand(2, PLACES) < 0.7 if masked else None
    found = []
    for attention in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in (queries, values, reference)]
        out = attention(
            inputs[0], mask, inputs[1], reference_points=inputs[2], spatial_shapes=torch.tensor(SHAPES),
            spatial_shapes_list=SHAPES,
        )[0]  # fmt: skip
        out.sin().sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_reference_for_all_groups_stands_for_one_of_each():
    attention = DeformableAttention(library_config(DinoSettings(hidden_size=32, num_heads=4, encoder_ffn=64)), 4, 4)
    torch.manual_seed(0)
    queries, values, reference = torch.randn(3, 30, 32), torch.randn(3, PLACES, 32), torch.rand(1, 30, 4, 2)
    one, each = (
        attention(queries, None, values, reference_points=at, spatial_shapes_list=SHAPES)[0]
        for at in (reference, reference.expand(3, -1, -1, -1))
    )
    torch.testing.assert_close(one, each)


def test_a_grid_made_in_inference_mode_serves_training_too():
    shapes = ((2, 3), (1, 7))
    with torch.inference_mode():
        grid = Grid.of(shapes, torch.device("cpu"))
    assert grid is Grid.of(shapes, torch.device("cpu")) and not grid.shift.is_inference()
    assert grid.sheet == (4, 7) and grid.cell.tolist() == [0, 1, 2, 7, 8, 9, *range(21, 28)]
    assert grid.place[:6].tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
