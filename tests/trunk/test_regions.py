"""Region masks of every kind in the model input's frame, and what the region encoder makes of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import random_images, scene_batch, scrambled, tiny_model

from lumen_ray.structures import Masks, Region, as_size
from lumen_ray.trunk.regions import RegionEncoder, region_mask

SIZE = (50, 100)  # height, width: scaled by 0.64 into the upper half of a 64 px input


def mask_of(kind, points=None, **more):
    mask = region_mask(Region(kind, SIZE, None if points is None else np.array(points), **more), 64)
    assert mask.shape == (64, 64) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    return mask.astype(bool)


def extent(mask):
    """xyxy of the pixels set, far edge exclusive."""
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_a_box_covers_its_scaled_box():
    mask = mask_of("box", [[25, 12.5], [75, 37.5]])
    assert np.abs(np.array(extent(mask)) - [16, 8, 48, 24]).max() <= 1 and mask[10:20, 20:40].all()


def test_a_polygon_is_filled():
    mask = mask_of("polygon", [[10, 10], [90, 10], [10, 40]])
    assert mask[10, 12] and not mask[22, 50]
    assert abs(mask.sum() - 0.5 * 80 * 30 * 0.64**2) < 60


def test_a_point_is_a_small_disc():
    mask = mask_of("point", [[50, 25]])
    y, x = np.nonzero(mask)
    assert abs(x.mean() - 32) < 1 and abs(y.mean() - 16) < 1 and 5 <= mask.sum() <= 25


def test_a_scribble_covers_the_line_between_its_points():
    mask = mask_of("scribble", [[10, 10], [90, 40]])
    for t in np.linspace(0, 1, 20):
        assert mask[int((10 + 30 * t) * 0.64), int((10 + 80 * t) * 0.64)]
    assert not mask[5, 50]


def test_a_mask_is_scaled():
    array = np.zeros((1, *SIZE), bool)
    array[0, 10:40, 20:60] = True
    mask = mask_of("mask", rle=Masks.from_arrays(array).rles[0])
    assert np.abs(np.array(extent(mask)) - np.array([20, 10, 60, 40]) * 0.64).max() <= 1


@settings(max_examples=150, deadline=None)
@given(
    st.integers(8, 3000), st.integers(8, 3000), st.floats(0, 1), st.floats(0, 1), st.floats(0.3, 1),
    st.sampled_from(("box", "point", "scribble", "polygon", "mask")),
)  # fmt: skip
def test_no_valid_region_is_empty(height, width, x, y, extent, kind):
    """At any size and position; an empty mask would give an embedding without information."""
    x1, y1 = x * (width - extent), y * (height - extent)
    x2, y2 = x1 + extent, y1 + extent
    points = {"box": [[x1, y1], [x2, y2]], "point": [[x2, y2]], "scribble": [[x1, y1], [x2, y2]]}
    points["polygon"] = [[x1, y1], [x2, y1], [x2, y2]]
    if kind == "mask":
        array = np.zeros((1, height, width), bool)
        array[0, min(int(y1), height - 1), min(int(x1), width - 1)] = True
        region = Region("mask", (height, width), rle=Masks.from_arrays(array).rles[0])
    else:
        points = np.clip(np.array(points[kind], np.float32), 0, [width, height])
        if kind == "box" and ((points[1] - points[0]) <= 0).any():  # too small for float32
            return
        region = Region(kind, (height, width), points)
    for input_size in (64, (32, 96), (96, 48)):
        mask = region_mask(region, input_size)
        assert mask.any() and mask.shape == as_size(input_size)


def encode(encoder, masks, images=None):
    images = random_images(2).float() / 255 if images is None else images
    merged = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 0, 1])
    return encoder(images, merged, masks, index)


@pytest.mark.parametrize("patch", [16, 14])
def test_the_embedding_depends_on_region_and_image(patch):
    encoder = scrambled(RegionEncoder(12, 20, patch))
    side = 4 * patch
    images = random_images(2, side).float() / 255
    masks = torch.zeros(3, side, side, dtype=torch.uint8)
    masks[0, :20, :20] = masks[1, 30:, 30:] = masks[2, :20, :20] = 1
    out = encode(encoder, masks, images)
    assert out.shape == (3, 20)
    assert (out[0] - out[1]).abs().max() > 1e-3  # same image, another place
    assert (out[0] - out[2]).abs().max() > 1e-3  # same place, another image
    torch.testing.assert_close(encode(encoder, masks, images), out)


@pytest.mark.parametrize("patch", [16, 14])
def test_a_region_of_a_non_square_input_pools_its_place(patch):
    encoder = scrambled(RegionEncoder(12, 20, patch))
    images = random_images(2)[:, :, : 2 * patch].float() / 255
    images = torch.cat([images, images], dim=3)[..., : 5 * patch]
    merged = torch.randn(2, 12, 2, 5, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 2 * patch, 5 * patch, dtype=torch.uint8)
    masks[0, :patch, 4 * patch :] = masks[1, patch:, :patch] = 1
    before = encoder(images, merged, masks, torch.tensor([0, 0]))
    merged[0, 0, 0, 4] += 1  # the cell under the first region
    after = encoder(images, merged, masks, torch.tensor([0, 0]))
    assert (before[0] - after[0]).abs().max() > 1e-3
    torch.testing.assert_close(before[1], after[1])


def test_regions_of_a_batch_do_not_touch_each_other():
    encoder = scrambled(RegionEncoder(12, 20, 16))
    masks = torch.zeros(3, 64, 64, dtype=torch.uint8)
    masks[0, :20, :20] = masks[1, 30:, 30:] = masks[2, 5:9] = 1
    before = encode(encoder, masks)
    masks[1] = 1
    after = encode(encoder, masks)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])


def test_gradients_of_region_captions_reach_the_region_encoder():
    model = tiny_model()
    batch = scene_batch(3, tasks=("region_caption",))
    assert len(batch.region_masks)
    model(batch)["lm"].total.backward()
    for name, p in model.trunk.regions.named_parameters():
        assert p.grad.abs().sum() > 0, name
