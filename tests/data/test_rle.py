"""RLE: our reading of the counts string against pycocotools, and refusal of what would crash it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from lumen_ray.data import rle
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Masks

masks = hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def lengths_of(mask):
    """Run lengths column by column, background first, the plain way."""
    flat = mask.T.ravel()
    lengths, current = [0], False
    for value in flat:
        if value != current:
            lengths.append(0)
            current = value
        lengths[-1] += 1
    return lengths


@given(masks)
def test_runs_are_those_of_the_mask(mask):
    (encoded,) = Masks.from_arrays(mask[None]).rles
    assert rle.runs(encoded["counts"]) == lengths_of(mask)


@given(masks)
def test_compressed_counts_come_back_unchanged_and_uncompressed_ones_mean_the_same(mask):
    (encoded,) = Masks.from_arrays(mask[None]).rles
    assert rle.check_rle(encoded, mask.shape) == encoded
    by_value = {"size": [str(side) for side in mask.shape], "counts": [float(n) for n in lengths_of(mask)]}
    assert rle.check_rle(by_value, mask.shape) == encoded
    plain = {"size": list(mask.shape), "counts": lengths_of(mask)}
    assert rle.check_rle(plain, mask.shape) == encoded
    as_bytes = {"size": list(mask.shape), "counts": encoded["counts"].encode()}
    assert rle.check_rle(as_bytes, mask.shape) == encoded
    assert rle.area(encoded) == mask.sum()


def test_long_runs():
    mask = np.zeros((2000, 150), bool)
    mask[700:1900, 1:149] = True
    (encoded,) = Masks.from_arrays(mask[None]).rles
    assert rle.runs(encoded["counts"]) == lengths_of(mask)


@given(st.text(max_size=30), st.integers(1, 50), st.integers(1, 50))
def test_any_string_is_a_mask_or_a_user_error(counts, height, width):
    try:
        good = rle.check_rle({"size": [height, width], "counts": counts}, (height, width))
    except UserError as error:
        assert error.reason == "invalid_mask"
    else:
        assert coco_mask.decode(good).shape == (height, width)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [4, 5], "counts": [20]}, "has size"),
        ({"size": [5, 4], "counts": [19]}, "cover 19 pixels"),
        ({"size": [5, 4], "counts": [30, -10]}, "cover 20 pixels"),
        ({"size": [5, 4], "counts": [1.5, 18.5]}, "whole numbers"),
        ({"size": [5, 4], "counts": None}, "run-length string"),
        ({"counts": [20]}, "keys"),
        ({}, "keys"),
        ("polygon", "keys"),
    ],
)
def test_malformed_run_lengths_are_refused(segmentation, message):
    with pytest.raises(UserError, match=message) as error:
        rle.check_rle(segmentation, (5, 4))
    assert error.value.reason == "invalid_mask"


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([0, 0, 1, 1], "at least 3 points"),
        ([], "at least 3 points"),
        ([0, 0, 1, 1, 2, 2, 3], "at least 3 points"),
        ([0, 0, 1, 1, 2, float("nan")], "flat list"),
        ([0, 0, 1e8, 1, 2, 2], "far outside"),
        ([[0, 0], [1, 1, 1], [2, 2]], "flat list"),
        ("polygon", "flat list"),
        (None, "flat list"),
    ],
)
def test_malformed_polygons_are_refused(polygon, message):
    with pytest.raises(UserError, match=message) as error:
        rle.from_polygon(polygon, (5, 4))
    assert error.value.reason == "invalid_mask"


def test_points_may_be_texts_and_pairs():
    flat = [0, 0, 3, 0, 3, 3]
    assert rle.from_polygon([str(c) for c in flat], (5, 4)) == rle.from_polygon(flat, (5, 4))
    assert rle.from_polygon([[0, 0], [3, 0], [3, 3]], (5, 4)) == rle.from_polygon(flat, (5, 4))


@given(st.integers(0, 30), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))
def test_a_rectangle_as_polygon_covers_its_box(x, y, width, height):
    size = (48, 64)
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    encoded = rle.from_polygon([float(c) for c in polygon], size)
    mask = Masks([encoded], size).to_arrays()[0]
    expected = np.zeros(size, bool)
    expected[y : y + height, x : x + width] = True
    assert np.array_equal(mask, expected)
    assert rle.tight_xywh(encoded) == [x, y, width, height]


def test_several_polygons_are_one_mask():
    parts = [[0, 0, 4, 0, 4, 4, 0, 4], [6, 6, 9, 6, 9, 9, 6, 9]]
    encoded = rle.merge([rle.from_polygon(part, (10, 10)) for part in parts])
    assert rle.area(encoded) == 16 + 9


@given(
    st.lists(
        st.tuples(*[st.floats(0, 2000, width=32)] * 2, *[st.floats(0.125, 2000, width=32)] * 2), min_size=1, max_size=5
    )
)
def test_boxes_survive_xywh(xywh):
    boxes = Boxes.from_xywh(xywh, (4000, 4000))
    assert np.allclose(boxes.to_xywh(), np.array(xywh, np.float64), atol=4000 * 2**-23)
