"""Pixels, boxes, masks and keypoints follow one map, whatever is drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from lumen_ray import config
from lumen_ray.data.schema import make_row
from lumen_ray.data.transforms import MASK_STRIDE, AugmentSettings, mirror_order, transform
from lumen_ray.errors import UserError

INPUT = 128
NAMES = ("nose", "left_eye", "right_eye", "upright")
WHITE, BACK = np.array([255, 255, 255]), 40


def rectangle_row(size, box):
    """An image with one white rectangle, and its row: keypoints at the middle, the left, the right and the top."""
    height, width = size
    x1, y1, x2, y2 = box
    image = np.full((height, width, 3), BACK, np.uint8)
    image[y1:y2, x1:x2] = WHITE
    inside = np.zeros((height, width), np.uint8)
    inside[y1:y2, x1:x2] = 1
    rle = coco_mask.encode(np.asfortranarray(inside))
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    points = [x, y, 2, x1 + 2, y, 2, x2 - 2, y, 1, x, y1 + 2, 2]
    instance = {
        "phrase": "face", "box": [float(c) for c in box],
        "mask": {"size": rle["size"], "counts": rle["counts"].decode()},
        "keypoints": [float(p) for p in points], "crowd": False, "area": float((x2 - x1) * (y2 - y1)),
    }  # fmt: skip
    return make_row("r", None, size, "test", classes=["face"], instances=[instance]), image


def extent(inside):
    """xyxy of the true pixels."""
    y, x = np.nonzero(inside)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)


@st.composite
def scenes(draw):
    height, width = draw(st.integers(60, 200)), draw(st.integers(60, 200))
    x1, y1 = draw(st.integers(0, width - 40)), draw(st.integers(0, height - 40))
    box = (x1, y1, draw(st.integers(x1 + 30, width)), draw(st.integers(y1 + 30, height)))
    zoom = sorted(draw(st.tuples(st.floats(0.6, 1.6), st.floats(0.6, 1.6))))
    augment = AugmentSettings(
        flip_x=draw(st.booleans()), flip_y=draw(st.booleans()), turn=draw(st.booleans()), scale=tuple(zoom),
        shift=draw(st.floats(0, 0.3)),
    )  # fmt: skip
    return (height, width), box, augment, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_everything_stays_on_the_rectangle(scene):
    size, box, augment, seed = scene
    row, image = rectangle_row(size, box)
    sample = transform(row, image, INPUT, augment, np.random.default_rng(seed), {"face": NAMES})
    found = sample.image[..., 0] > 180  # the padding is 114
    if len(sample.kept) == 0:
        assert found.mean() < 0.4
        return
    assert np.abs(extent(found) - sample.boxes[0]).max() <= 2
    mask = sample.masks[0]
    assert mask.shape == (INPUT // MASK_STRIDE,) * 2
    inner = sample.boxes[0, 2:] - sample.boxes[0, :2]
    if inner.min() > MASK_STRIDE:  # a sliver at the border may fill no cell by half
        assert np.abs(extent(mask) * MASK_STRIDE - sample.boxes[0]).max() <= MASK_STRIDE / 2 + 1
    stored = np.array(row["instances"][0]["keypoints"]).reshape(-1, 3)
    mirrored = np.linalg.det(sample.matrix[:, :2]) < 0
    wanted = stored[[0, 2, 1, 3]] if mirrored else stored
    wanted_xy = wanted[:, :2] @ sample.matrix[:, :2].T + sample.matrix[:, 2]
    points = sample.keypoints[0]
    np.testing.assert_allclose(points[:, :2], wanted_xy, atol=1e-3)
    inside = ((wanted_xy >= 0) & (wanted_xy <= INPUT)).all(1)
    np.testing.assert_array_equal(points[:, 2], np.where(inside, wanted[:, 2], 0))


def test_a_mirrored_left_eye_is_a_right_eye():
    """Found in the pixels: of a mirrored face the left eye lies where the right one's colour is."""
    row, image = rectangle_row((100, 100), (20, 20, 80, 80))
    image[46:54, 20:28] = (255, 0, 0)  # at the left eye
    settings_ = AugmentSettings(flip_x=True)
    samples = [transform(row, image, 100, settings_, np.random.default_rng(s), {"face": NAMES}) for s in range(20)]
    mirrored = [s for s in samples if s.matrix[0, 0] < 0]
    assert mirrored and len(mirrored) < 20
    for sample in samples:
        red = 2 if sample.matrix[0, 0] < 0 else 1
        x, y, _ = sample.keypoints[0][red]
        assert tuple(sample.image[int(y), int(x)]) == (255, 0, 0)
    plain = transform(row, image, 100, settings_, np.random.default_rng(0))
    assert plain.keypoints[0].shape == (4, 3)  # without names nothing is exchanged, and nothing breaks


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("head", "left hand", "right hand"), (0, 2, 1)),
        (("left_hip", "right_hip", "nose"), (1, 0, 2)),
        (("Left Ear", "right ear"), (1, 0)),
        (("left eye", "right ear"), (0, 1)),
        (("upright", "upleft"), (0, 1)),
        (("front left paw", "front right paw", "back left paw"), (1, 0, 2)),
    ],
)
def test_which_names_are_a_pair(names, order):
    assert mirror_order(names) == order


def test_the_settings_do_not_move_the_random_stream():
    row, image = rectangle_row((80, 60), (10, 10, 50, 50))
    after = set()
    for augment in (AugmentSettings(), AugmentSettings(flip_x=True, turn=True, scale=(0.5, 2.0), shift=0.2, color=0.5)):
        rng = np.random.default_rng(3)
        transform(row, image, 64, augment, rng)
        after.add(rng.random())
    assert len(after) == 1


@pytest.mark.parametrize("scale", [[0, 1], [1.2, 0.8], [-1, 1], [1, float("inf")]])
def test_a_wrong_zoom_is_told(scale):
    with pytest.raises(UserError, match="0 < smallest <= largest"):
        config.validate(AugmentSettings, {"scale": scale}, "augment")
