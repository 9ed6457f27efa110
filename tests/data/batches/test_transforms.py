"""Pixels, boxes, masks and keypoints follow one map, whatever is drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from lumen_ray import config
from lumen_ray.data.batches.transforms import (
    PAD_VALUE,
    clip_boxes,
    draw_matrix,
    fit,
    map_boxes,
    mirror_order,
    transform,
    warp,
)
from lumen_ray.data.images import Picture
from lumen_ray.data.shards.schema import make_row
from lumen_ray.errors import UserError
from lumen_ray.recipe import AugmentSettings
from lumen_ray.targets import MASK_STRIDE, Frame

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
def test_annotations_follow_the_rectangle(scene):
    size, box, augment, seed = scene
    row, image = rectangle_row(size, box)
    sample = transform(row, image, INPUT, augment, np.random.default_rng(seed), {"face": NAMES})
    found = sample.image[..., 0] > 180  # the padding is darker
    if len(sample.kept) == 0:
        assert found.mean() < 0.4
        return
    assert np.abs(extent(found) - sample.boxes[0]).max() <= 2
    mask = sample.masks[0]
    assert mask.shape == (INPUT // MASK_STRIDE,) * 2
    inner = sample.boxes[0, 2:] - sample.boxes[0, :2]
    if inner.min() > MASK_STRIDE:  # a sliver at the border may fill no cell by half
        assert np.abs(extent(mask > 127) * MASK_STRIDE - sample.boxes[0]).max() <= MASK_STRIDE
    stored = np.array(row["instances"][0]["keypoints"]).reshape(-1, 3)
    mirrored = np.linalg.det(sample.matrix[:, :2]) < 0
    wanted = stored[[0, 2, 1, 3]] if mirrored else stored
    wanted_xy = wanted[:, :2] @ sample.matrix[:, :2].T + sample.matrix[:, 2]
    points = sample.keypoints[0]
    np.testing.assert_allclose(points[:, :2], wanted_xy, atol=1e-3)
    inside = ((wanted_xy >= 0) & (wanted_xy <= INPUT)).all(1)
    np.testing.assert_array_equal(points[:, 2], np.where(inside, wanted[:, 2], 0))


@pytest.mark.parametrize(("side", "side_out"), [(507, 512), (509, 512), (127, 128), (128, 128), (511, 256)])
def test_an_image_of_nearly_the_inputs_size_is_scaled_with_its_boxes(side, side_out):
    """An enlargement by less than a hundredth moves the far side by pixels."""
    for box in ((10, 20, side, side), (10, 20, side - 30, side - 10)):
        row, image = rectangle_row((side, side), box)
        sample = transform(row, image, side_out, AugmentSettings(), np.random.default_rng(0))
        found = extent(sample.image[..., 0] > (255 + BACK) / 2)
        assert np.abs(found - sample.boxes[0]).max() <= 0.6, "half a pixel, where an edge falls within one"
        np.testing.assert_allclose(sample.boxes[0], np.array(box) * side_out / side, rtol=1e-6)


def test_a_whole_shift_keeps_every_pixel():
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    moved = warp(image, np.array([[1, 0, -7.0], [0, 1, 5]]), (50, 70))
    np.testing.assert_array_equal(moved[5:45, :53], image[:, 7:])
    assert (moved[:5] == PAD_VALUE).all() and (moved[:, 53:] == PAD_VALUE).all()
    np.testing.assert_array_equal(fit(image, (40, 60))[0], image)


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
def test_a_wrong_zoom_is_reported(scale):
    with pytest.raises(UserError, match="0 < smallest <= largest"):
        config.validate(AugmentSettings, {"scale": scale}, "augment")


@settings(max_examples=60, deadline=None)
@given(scenes(), st.sampled_from([2, 4]))
def test_a_reduced_image_gives_the_same_sample(scene, reduction):
    """The same map, boxes and masks; the pixels of the rectangle lie where those of the whole picture do."""
    (height, width), box, augment, seed = scene
    size = (height * 4, width * 4)
    row, image = rectangle_row(size, tuple(4 * c for c in box))
    whole = transform(row, image, INPUT, augment, np.random.default_rng(seed))
    small = Image.fromarray(image).resize((size[1] // reduction, size[0] // reduction), Image.Resampling.BOX)
    picture = Picture(np.asarray(small), size, reduction)
    reduced = transform(row, picture, INPUT, augment, np.random.default_rng(seed))
    np.testing.assert_array_equal(reduced.matrix, whole.matrix)
    np.testing.assert_array_equal(reduced.boxes, whole.boxes)
    np.testing.assert_array_equal(reduced.masks, whole.masks)
    apart = np.abs(reduced.image.astype(float) - whole.image.astype(float))
    assert apart.mean() < 3
    found, expected = (s.image[..., 0] > 180 for s in (reduced, whole))
    assert found.any() == expected.any()
    if found.any():
        assert np.abs(extent(found) - extent(expected)).max() <= 1


@settings(max_examples=100, deadline=None)
@given(scenes(), st.integers(0, 99))
def test_masks_say_how_much_of_each_cell_is_covered(scene, zoom):
    """So that their sum is the area, and a contour between two cells is where it was once upsampled."""
    size, box, _, seed = scene
    row, image = rectangle_row(size, box)
    augment = AugmentSettings(scale=(0.5 + zoom / 100, 0.5 + zoom / 100), shift=0.0)
    sample = transform(row, image, INPUT, augment, np.random.default_rng(seed))
    if len(sample.kept) == 0:
        return
    x1, y1, x2, y2 = sample.boxes[0]
    covered = sample.masks[0].astype(float).sum() / 255 * MASK_STRIDE**2
    contour = 2 * float(x2 - x1 + y2 - y1)  # whole cells are off by up to half a cell along it
    assert covered == pytest.approx((x2 - x1) * (y2 - y1), abs=contour * MASK_STRIDE / 4)
    if y2 - y1 < 3 * MASK_STRIDE:  # no row of cells is sure to be covered from top to bottom
        return
    cells = np.arange(INPUT // MASK_STRIDE) * MASK_STRIDE
    across = np.clip(x2 - cells, 0, MASK_STRIDE) - np.clip(x1 - cells, 0, MASK_STRIDE)
    row_of_cells = sample.masks[0][int((y1 + y2) / 2 / MASK_STRIDE)] / 255
    assert np.abs(row_of_cells - across / MASK_STRIDE).max() < 0.5  # stored pixels are resampled twice


inputs = st.tuples(st.integers(4, 20).map(lambda n: 16 * n), st.integers(4, 20).map(lambda n: 16 * n))


@settings(max_examples=150, deadline=None)
@given(scenes(), inputs)
def test_an_input_of_any_shape_shows_the_rectangle_where_its_box_is(scene, input_size):
    size, box, augment, seed = scene
    row, image = rectangle_row(size, box)
    sample = transform(row, image, input_size, augment, np.random.default_rng(seed), {"face": NAMES})
    assert sample.image.shape == (*input_size, 3)
    back = np.linalg.inv(np.vstack([sample.matrix, [0, 0, 1]]))[:2]
    whole = map_boxes(np.array([box], float), sample.matrix)
    np.testing.assert_allclose(map_boxes(whole, back)[0], box, atol=1e-9)
    if len(sample.kept) == 0:
        return
    np.testing.assert_allclose(sample.boxes[0], clip_boxes(whole, input_size)[0], atol=1e-4)
    found = sample.image[..., 0] > 180
    assert np.abs(extent(found) - sample.boxes[0]).max() <= 2
    mask = sample.masks[0]
    assert mask.shape == (input_size[0] // MASK_STRIDE, input_size[1] // MASK_STRIDE)
    inner = sample.boxes[0, 2:] - sample.boxes[0, :2]
    if inner.min() > MASK_STRIDE:
        assert np.abs(extent(mask > 127) * MASK_STRIDE - sample.boxes[0]).max() <= MASK_STRIDE
    points = sample.keypoints[0]
    assert (((points[:, :2] >= 0) & (points[:, :2] <= input_size[::-1])).all(1) | (points[:, 2] == 0)).all()


@settings(max_examples=100, deadline=None)
@given(scenes(), inputs)
def test_a_box_comes_back_from_any_bucket_as_it_was(scene, input_size):
    """The way of a training target and of a prediction: stored -> input -> stored."""
    size, box, _, _ = scene
    row, image = rectangle_row(size, box)
    sample = transform(row, image, input_size, AugmentSettings(), np.random.default_rng(0))
    pixels, frame = fit(image, input_size)
    np.testing.assert_array_equal(pixels, sample.image)  # what training sees is what inference sees
    assert frame == Frame.fit(size, input_size) and frame.input_size == input_size
    # as large as fits: one side fills the input, the other has room
    scaled = np.array(size) * frame.scale
    assert (scaled <= np.array(input_size) + 1e-9).all() and np.isclose(scaled, input_size).any()
    np.testing.assert_allclose(sample.boxes[0] / frame.scale, box, rtol=1e-6, atol=1e-4)


def test_an_input_that_is_not_square_is_turned_by_half_turns_only():
    row, image = rectangle_row((60, 90), (10, 10, 50, 50))
    settings_ = AugmentSettings(turn=True)
    turns = {False: set(), True: set()}
    for seed in range(30):
        for square in turns:
            matrix = draw_matrix((60, 90), 96 if square else (64, 96), settings_, np.random.default_rng(seed))
            turns[square].add((round(np.sign(matrix[0, 0])), round(np.sign(matrix[0, 1]))))
    assert turns == {False: {(1, 0), (-1, 0)}, True: {(1, 0), (-1, 0), (0, 1), (0, -1)}}
