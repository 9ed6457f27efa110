"""Maps at the size of the stored image, against torch's own interpolation of the whole image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.decoders.common.upsample import at_stored_size, masks_at_stored_size
from lumen_ray.structures import Masks
from lumen_ray.targets import Frame


def by_torch(values, stride, frame):
    shape = [max(round(s * stride / frame.scale), low) for s, low in zip(values.shape, frame.size, strict=True)]
    height, width = frame.size
    return F.interpolate(values[None, None], shape, mode="bilinear", align_corners=False)[0, 0, :height, :width]


frames = st.builds(
    lambda height, width, side: Frame.fit((height, width), side),
    st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 64, (32, 64)]),
)  # fmt: skip


@given(frames, st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_a_window_is_that_part_of_torchs_bilinear_map(frame, seed, left, top):
    values = torch.rand([side // 4 for side in frame.input_size], generator=torch.Generator().manual_seed(seed))
    whole = by_torch(values, 4, frame)
    height, width = frame.size
    x, y = int(left * (width - 1)), int(top * (height - 1))
    part = at_stored_size(values, 4, frame, (x, y, width, height))
    np.testing.assert_allclose(part, whole[y:, x:], atol=2e-4)
    assert at_stored_size(values, 4, frame).shape == frame.size


@given(frames, st.integers(0, 1000), st.sampled_from([0.6, 2.0, 6.0]))
def test_masks_are_those_of_the_whole_map(frame, seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand([side // 4 for side in frame.input_size], generator=generator) ** sharpness for _ in range(2)]
    maps.append(torch.zeros_like(maps[0]))
    found = masks_at_stored_size(maps, 4, frame).to_arrays()
    for mask, values in zip(found, maps, strict=True):
        whole = by_torch(values, 4, frame)
        differing = (whole - 0.5).abs()[torch.from_numpy(mask) != (whole > 0.5)]
        assert differing.numel() == 0 or differing.max() < 1e-3  # the rounding of two orders of summation


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5), st.integers(0, 1000))
def test_pasted_crops_are_the_rle_of_the_whole_image(height, width, x, y, seed):
    crop = np.random.default_rng(seed).random((height, width)) < 0.5
    image = np.zeros((height + y + seed % 3, width + x + seed % 2), bool)
    image[y : y + height, x : x + width] = crop
    assert Masks.from_crops([crop], [(x, y)], image.shape).rles == Masks.from_arrays(image[None]).rles


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_whole_and_empty_masks(value):
    frame = Frame.fit((40, 60), 32)
    (mask,) = masks_at_stored_size([torch.full((8, 8), value)], 4, frame).to_arrays()
    assert mask.shape == (40, 60) and mask.all() == bool(value) and mask.any() == bool(value)
