"""Mask prompts against the encoder of pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from lumen_ray.errors import UserError
from lumen_ray.wire.images import checked_rle


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_checked_rle_agrees_with_pycocotools(height, width, seed, share):
    pixels = np.random.default_rng(seed).random((height, width)) < share
    pixels[0, 0] = True
    flat = pixels.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    runs = [0, *runs]  # the first run is background
    text = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
    for counts in (text, runs):
        rle = checked_rle({"size": [height, width], "counts": counts}, (height, width))
        assert rle["counts"] == text
        assert (coco_mask.decode(rle).astype(bool) == pixels).all()


@given(st.text(max_size=30))
@example("5Ā")
def test_arbitrary_counts_are_refused_or_safe(counts):
    try:
        rle = checked_rle({"size": [5, 4], "counts": counts}, (5, 4))
    except UserError:
        return
    assert coco_mask.decode(rle).shape == (5, 4)


def test_mask_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"the image is \[5, 4\]"):
        checked_rle({"size": [4, 5], "counts": [0, 20]}, (5, 4))
