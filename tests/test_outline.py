"""Outlines of masks: what a reader fills that cuts coordinates off to whole pixels and draws both edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lumen_ray.outline import INSET, one_outline


def fill(points, size):
    """The pixels of a polygon of horizontal and vertical edges, as OpenCV fills one of whole numbers: even-odd, and all
    pixels of the edges; bool [H, W]."""
    inside, edges = np.zeros(size, bool), np.zeros(size, bool)
    corners = points.astype(int)  # cut off
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        assert x1 == x2 or y1 == y2
        edges[min(y1, y2) : max(y1, y2) + 1, min(x1, x2) : max(x1, x2) + 1] = True
        if x1 == x2:  # crossed by the rays of rows between
            inside[min(y1, y2) : max(y1, y2), x1:] ^= True
    return inside | edges


def one_part(seed, height, width, number):
    """A mask of one 4-connected part, with holes; None if there is none."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(number):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        mask[y : y + h, x : x + w] = rng.random() < 0.6
    parts, _ = ndimage.label(mask)
    return parts == np.bincount(parts[mask]).argmax() if mask.any() else None


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20), st.integers(1, 14))
def test_an_outline_fills_the_mask_exactly_and_has_its_box(seed, height, width, number):
    mask = one_part(seed, height, width, number)
    if mask is None:
        return
    points = one_outline(mask)
    ys, xs = np.nonzero(mask)
    assert np.allclose(points.min(0), [xs.min() + INSET, ys.min() + INSET])
    assert np.allclose(points.max(0), [xs.max() + 1 - INSET, ys.max() + 1 - INSET])
    parts_with_islands = ndimage.label(mask)[1]
    assert parts_with_islands == 1 and np.array_equal(fill(points, mask.shape), mask)


def test_several_parts_are_joined_by_a_line(capsys):
    mask = np.zeros((12, 20), bool)
    mask[2:5, 2:6] = mask[2:5, 10:16] = mask[8:11, 10:14] = True
    points = one_outline(mask)
    crossings = np.abs(np.diff(np.vstack([points, points[:1]]), axis=0)).max(1)
    assert len(points) == 3 * 4 + 2 * 2 and crossings.max() < 7
    assert points.min() > 2 and np.allclose(points.max(0), [16 - INSET, 11 - INSET])


@pytest.mark.parametrize("shape", [(3, 3), (1, 1)])
def test_an_empty_mask_has_no_outline_and_a_full_one_four_corners(shape):
    assert one_outline(np.zeros(shape, bool)).shape == (0, 2)
    assert len(one_outline(np.ones(shape, bool))) == 4


def test_pixels_that_touch_at_a_corner_are_parts_of_their_own():
    for mask in (np.eye(2, dtype=bool), np.eye(2, dtype=bool)[::-1]):
        assert len(one_outline(mask)) == 4 + 4 + 2
