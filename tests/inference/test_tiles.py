"""Images in tiles: where tiles lie, and that what several of them see of one object is one instance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.answer import Answer
from lumen_ray.data.scenes.render import render
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.inference.tiles import Tiles, run_tiled
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction


@given(st.integers(1, 400), st.integers(1, 400), st.integers(32, 200), st.floats(0, 0.8))
def test_tiles_cover_the_image_and_overlap(height, width, side, overlap):
    windows = Tiles(side, overlap).windows((height, width))
    seen = np.zeros((height, width), int)
    for x1, y1, x2, y2 in windows:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert (x2 - x1, y2 - y1) == (min(side, width), min(side, height))
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1 and len(set(windows)) == len(windows)
    shared = int(side * overlap) - 1
    for start, length in ((0, width), (1, height)):
        starts = sorted({window[start] for window in windows})
        assert all(b - a <= side - shared for a, b in zip(starts, starts[1:], strict=False)) or length <= side


@pytest.mark.parametrize(("side", "overlap"), [(31, 0.2), (0, 0.2), (64, -0.1), (64, 0.9)])
def test_tiles_that_make_no_sense_are_refused(side, overlap):
    with pytest.raises(UserError, match="give "):
        Tiles(side, overlap)


class Eyes:
    """An engine that finds every rectangle of one bright value, as far as the image shows it; those that take more than
    `most` of the image's pixels and, in images of more than `sharp` pixels, small ones, it does not see."""

    def __init__(self, most=1.0, sharp=1 << 30):
        self.most, self.sharp, self.passes = most, sharp, []

    def run(self, images, requests, *, score_threshold=0.05, max_per_phrase=300, max_new_tokens=48):
        self.passes.append(len(images))
        return [
            [self._answer(image, request) for request in mine] for image, mine in zip(images, requests, strict=True)
        ]

    def _answer(self, image, request):
        size = image.shape[:2]
        if request.task == "caption":
            return Answer("caption", size, text=f"{size}")
        boxes, scores, masks, points = [], [], [], []
        for value in np.unique(image[image > 0]):
            mask = image[..., 0] == value
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if mask.sum() > self.most * mask.size or (mask.size > self.sharp and mask.sum() < 0.01 * mask.size):
                continue
            boxes.append([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            scores.append(0.5 + 0.4 * mask.sum() / 10_000)
            masks.append(mask)
            points.append([[xs[0], ys[0], 0.9]])
        order = np.argsort(-np.array(scores))
        found = Prediction("thing", Boxes(np.array(boxes, float).reshape(-1, 4)[order], size), np.array(scores)[order])
        if request.task == "segment":
            found.masks = Masks.from_arrays(np.array(masks).reshape(-1, *size)[order])
        if request.task == "pose":
            found.keypoints = Keypoints(np.array(points).reshape(-1, 1, 3)[order], ("corner",), size)
        return Answer(request.task, size, [found])


def scene(size, rectangles):
    """An image with a rectangle (xyxy) of each value from 1."""
    image = np.zeros((*size, 3), np.uint8)
    for value, (x1, y1, x2, y2) in enumerate(rectangles, start=1):
        image[y1:y2, x1:x2] = value
    return image


def found(engine, image, tiles, task="segment"):
    request = make_request(task, classes=["thing"], keypoints=["corner"] if task == "pose" else None)
    ((prediction,),) = ([a.predictions[0]] for a in run_tiled(engine, image, [request], tiles))
    return prediction


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3]), st.booleans())
def test_every_object_is_found_once_with_its_box_and_mask(seed, overlap, sees_whole):
    """Objects of any size at any place: inside a tile, across seams and corners, larger than a tile."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(40, 200)), int(rng.integers(40, 200)))
    rectangles, taken = [], np.zeros(size, bool)
    for _ in range(12):
        w, h = rng.integers(4, 90, 2)
        x, y = rng.integers(0, size[1] - 4), rng.integers(0, size[0] - 4)
        box = (int(x), int(y), int(min(x + w, size[1])), int(min(y + h, size[0])))
        if not taken[max(0, box[1] - 6) : box[3] + 6, max(0, box[0] - 6) : box[2] + 6].any():
            taken[box[1] : box[3], box[0] : box[2]] = True
            rectangles.append(box)
    image = scene(size, rectangles)
    engine = Eyes() if sees_whole else Eyes(sharp=64 * 64)
    prediction = found(engine, image, Tiles(64, overlap))
    boxes = {tuple(int(v) for v in box) for box in prediction.boxes.xyxy}
    if sees_whole or overlap > 0:
        assert boxes == set(rectangles) and len(prediction) == len(rectangles)
        masks = prediction.masks.to_arrays()
        for box, mask in zip(prediction.boxes.xyxy.astype(int), masks, strict=True):
            assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1]) and mask[box[1], box[0]]
    else:  # nothing tells that the halves of an object that no two tiles see are one
        assert len(prediction) >= len(rectangles)
    assert (np.diff(prediction.scores) <= 0).all()


def test_neighbours_are_not_joined_across_a_seam():
    """Two objects of the same rows that touch the same seam, and a third between them."""
    image = scene((64, 120), [(40, 10, 60, 30), (62, 10, 80, 30), (50, 40, 70, 60)])
    prediction = found(Eyes(), image, Tiles(64, 0.2))
    assert len(prediction) == 3


def test_a_piece_is_not_another_class():
    """A tile sees a part of an object and takes it for something else; another tile sees it whole."""

    class Mistaken(Eyes):
        def _answer(self, image, request):
            answer = super()._answer(image, request)
            (found,) = answer.predictions
            small = found.boxes.area < 300
            parts = [found[np.flatnonzero(~small)], found[np.flatnonzero(small)]]
            answer.predictions = [
                Prediction(name, part.boxes, part.scores) for name, part in zip(("large", "small"), parts, strict=True)
            ]
            return answer

    image = scene((64, 110), [(46, 10, 76, 40), (95, 50, 105, 60)])
    (answer,) = run_tiled(
        Mistaken(sharp=64 * 64), image, [make_request("detect", classes=["large", "small"])], Tiles(64)
    )
    large, small = answer.predictions
    assert large.boxes.xyxy.tolist() == [[46, 10, 76, 40]] and small.boxes.xyxy.tolist() == [[95, 50, 105, 60]]


def test_keypoints_move_with_their_tile():
    image = scene((64, 200), [(150, 20, 170, 40)])
    prediction = found(Eyes(sharp=64 * 64), image, Tiles(64, 0.25), "pose")
    assert prediction.keypoints.xyv.tolist() == [[[150, 20, pytest.approx(0.9)]]]


def test_texts_see_the_whole_image_and_small_images_are_not_tiled():
    engine = Eyes()
    requests = [make_request("caption"), make_request("detect", classes=["thing"])]
    image = scene((64, 300), [(0, 0, 20, 20)])
    text, boxes = run_tiled(engine, image, requests, Tiles(64, 0.0), batch_size=4)
    assert text.text == "(64, 300)" and len(boxes.predictions[0]) == 1
    assert engine.passes == [1, 4, 1]  # the whole image, then five tiles
    engine.passes.clear()
    run_tiled(engine, image[:, :64], requests, Tiles(64, 0.0))
    run_tiled(engine, image, requests[:1], Tiles(64, 0.0))
    assert engine.passes == [1, 1]


def test_small_objects_of_a_large_image_are_found_by_the_bundled_weights():
    """Sixteen scenes side by side: at the model's input they are too small, in tiles they are as in training."""
    engine = Engine.load("nano")
    drawn = [render(10_000, n) for n in range(16)]
    image = np.concatenate([np.concatenate([s.image for s in drawn[r : r + 4]], axis=1) for r in range(0, 16, 4)])
    truth = []
    for n, one in enumerate(drawn):
        for item in one.objects:
            if item.name in engine.classes:
                truth.append((item.name, np.array(item.box) + [128 * (n % 4), 128 * (n // 4)] * 2))
    requests = [make_request("detect", classes=engine.classes)]

    def recall(answer):
        hits = 0
        for name, box in truth:
            prediction = next(p for p in answer.predictions if p.phrase == name)
            hits += bool(len(prediction)) and Boxes([box], image.shape[:2]).iou(prediction.boxes).max() > 0.5
        return hits / len(truth)

    ((whole,),) = engine.run([image], [requests], score_threshold=0.3)
    (tiled,) = run_tiled(engine, image, requests, Tiles(128, 0.25), score_threshold=0.3)
    assert recall(tiled) >= 0.95 and recall(whole) <= 0.05
    # objects cut by a tile are not found twice; what the look at the whole image makes up stays
    number = sum(map(len, tiled.predictions)) - sum(map(len, whole.predictions))
    assert number <= 1.1 * len(truth)
