"""The light decoder: it learns a scene, its geometry is right in every frame, and prompts and images stay apart."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import scrambled

from lumen_ray.decoders.base import PredictSettings, PromptSpec
from lumen_ray.decoders.common.boxes import giou_loss, greedy_nms
from lumen_ray.decoders.common.ragged import place_in_group
from lumen_ray.decoders.lumen.assigner import assign
from lumen_ray.decoders.lumen.decoder import LumenDecoder
from lumen_ray.decoders.lumen.mask_positives import best_of_each, scattered
from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.structures import Boxes
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, PerceptionTargets

SIDE, DENSE, LINK = 64, 12, 10
SETTINGS = LumenSettings(hidden_size=16, num_heads=2, num_layers=1)
DETECT = PromptSpec("thing")


def decoder(std=0.2, **changes):
    torch.manual_seed(0)
    made = LumenDecoder(LumenSettings.model_validate(SETTINGS.model_dump() | changes), DENSE, LINK)
    return scrambled(made, std) if std else made


def make_link(embeddings, images, parents=None):
    images = torch.tensor(images, dtype=torch.int64)
    parents = torch.full_like(images, -1) if parents is None else torch.tensor(parents)
    return SuperLink("lumen", embeddings, images, parents)


def random_inputs(prompts=5, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(images, DENSE, SIDE // 4, SIDE // 4, generator=generator)
    return torch.randn(prompts, LINK, generator=generator), dense


def make_targets(boxes, masks=None, crowd=None, keypoints=None):
    """One list of boxes per link, all of the same length; masks: bool arrays [P, G, S/4, S/4]."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(len(boxes), -1, 4)
    shape = boxes.shape[:2]
    index = torch.full(shape, -1)
    if masks is not None:
        index = torch.arange(shape.numel()).view(shape)
        masks = torch.tensor(np.array(masks), dtype=torch.uint8).flatten(0, 1) * 255
    return PerceptionTargets(
        boxes=boxes,
        valid=torch.ones(shape, dtype=torch.bool),
        crowd=torch.zeros(shape, dtype=torch.bool) if crowd is None else torch.tensor(crowd),
        mask_index=index,
        masks=torch.zeros(0, SIDE // 4, SIDE // 4, dtype=torch.uint8) if masks is None else masks,
        keypoints=torch.zeros(*shape, 3) if keypoints is None else torch.tensor(keypoints, dtype=torch.float32),
        counted=torch.tensor([True] * shape[0]),
    )


# -- learning ---------------------------------------------------------------------------------------------------------


def circle_mask(box, step=4):
    """bool [S/4, S/4] of the ellipse in a box."""
    line = (np.arange(SIDE // step) + 0.5) * step
    cx, cy, rx, ry = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    return ((line - cx) / rx)[None] ** 2 + ((line - cy) / ry)[:, None] ** 2 <= 1


@pytest.fixture(scope="module", params=[False, True], ids=["", "presence"])
def learned(request):
    """A decoder that has learned one scene by heart: two things for prompt 0, one for prompt 1, nothing for 2."""
    torch.manual_seed(0)
    model = decoder(std=0, presence=request.param)
    boxes = [
        [[4, 6, 28, 30], [36, 34, 60, 58]],
        [[34, 4, 58, 24]] * 2,
        [[0, 0, 1, 1]] * 2,
        [[4, 6, 28, 30], [36, 34, 60, 58]],
    ]
    keypoints = np.zeros((4, 2, 3))
    keypoints[3] = [[8, 10, 2], [56, 38, 2]]
    targets = make_targets(boxes, [[circle_mask(b) for b in row] for row in boxes], keypoints=keypoints)
    targets.valid[2] = targets.valid[1, 1] = False
    targets.counted[3] = False
    line = (np.arange(16) + 0.5) * 4
    picture = np.stack([sum(circle_mask(b) for b in boxes[0]), circle_mask(boxes[1][0])]).astype(np.float32)
    texture = np.random.default_rng(0).normal(size=(DENSE - 4, 16, 16))
    ramps = np.stack(np.meshgrid(line, line)) / SIDE
    dense = torch.tensor(np.concatenate([picture, ramps, 0.3 * texture]), dtype=torch.float32)[None]
    link = make_link(torch.randn(4, LINK), [0] * 4, [-1, -1, -1, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(220):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, 2 * (1 - step / 220))
        total = sum(t.total / t.count.clamp_min(1) for t in model.loss(model(link, dense), targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    specs = [PromptSpec("circle", masks=True, keypoints=("corner",)), PromptSpec("other", masks=True), DETECT, None]
    return model.eval(), link, dense, specs, boxes


def found(learned, frame):
    model, link, dense, specs, _ = learned
    with torch.no_grad():
        return model.predict(model(link, dense), [frame], specs, PredictSettings(score_threshold=0.4))


def test_one_scene_can_be_learned(learned):
    predictions = found(learned, Frame.fit((SIDE, SIDE), SIDE))
    assert [None if p is None else len(p) for p in predictions] == [2, 1, 0, None]
    for prediction, truth in zip(predictions[:2], (learned[4][0], learned[4][1][:1]), strict=True):
        overlap = prediction.boxes.iou(Boxes(np.array(truth), (SIDE, SIDE)))
        assert (overlap.max(0) > 0.7).all()
        matched = overlap.argmax(1)
        for i, mask in enumerate(prediction.masks.to_arrays()):
            wanted = circle_mask(truth[matched[i]], step=1)
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.6
    corners = np.array([[8, 10], [56, 38]])[predictions[0].boxes.xyxy[:, 0].argsort().argsort()]
    assert np.abs(predictions[0].keypoints.xyv[:, 0, :2] - corners).max() < 3


@pytest.mark.parametrize("size", [(128, 256), (400, 150), (30, 64), (64, 64), (420, 500)])
def test_predictions_come_back_in_the_frame_of_the_stored_image(learned, size):
    """The stored image is not square: the input shows it scaled, at the top left."""
    frame = Frame.fit(size, SIDE)
    assert frame.scale == SIDE / max(size)
    square, mapped = found(learned, Frame.fit((SIDE, SIDE), SIDE)), found(learned, frame)
    height, width = (side * frame.scale for side in size)
    for a, b in zip(square[:2], mapped[:2], strict=True):
        kept = [i for i in range(len(a)) if _center_inside(learned, a, i, width, height)]
        assert len(b) == len(kept) and b.boxes.size == size
        limit = np.array([width, height] * 2)
        np.testing.assert_allclose(b.boxes.xyxy * frame.scale, np.minimum(a.boxes.xyxy[kept], limit), atol=1e-3)
        np.testing.assert_allclose(b.scores, a.scores[kept], rtol=1e-5)
        for i, mask in zip(kept, b.masks.to_arrays(), strict=True):
            assert mask.shape == size
            ys, xs = ((np.arange(n) + 0.5) * frame.scale for n in size)
            reference = a.masks.to_arrays()[i][np.ix_(ys.astype(int).clip(0, 63), xs.astype(int).clip(0, 63))]
            assert (mask == reference).mean() > 0.97
        if a.keypoints is not None:
            limit = np.array([width, height])
            got, want = b.keypoints.xyv[..., :2] * frame.scale, a.keypoints.xyv[kept][..., :2]
            np.testing.assert_allclose(got, np.minimum(want, limit), atol=1e-3)


def _center_inside(learned, prediction, i, width, height):
    """Instances whose peak lies in the padding are not reported; these objects' peaks lie well inside their boxes."""
    x1, y1, x2, y2 = prediction.boxes.xyxy[i]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    assert abs(x - width) > 6 and abs(y - height) > 6, "choose sizes whose border does not cut a peak"
    return x < width and y < height


# -- independence -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions_of(model, embeddings, images, dense, sizes, spec=DETECT, threshold=0.0):
    specs = [spec] * len(images)
    frames = [Frame.fit(size, SIDE) for size in sizes]
    raw = model(make_link(embeddings, images), dense)
    return model.predict(raw, frames, specs, PredictSettings(threshold, 20))


def same(a, b):
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    np.testing.assert_allclose(a.boxes.xyxy, b.boxes.xyxy, atol=1e-3)
    if a.masks is not None:
        assert (a.masks.to_arrays() == b.masks.to_arrays()).mean() > 0.9999


def test_a_prompt_does_not_depend_on_other_prompts_or_images():
    model = decoder()
    embeddings, dense = random_inputs()
    sizes, images, spec = [(64, 64), (40, 64)], [0, 1, 1, 0, 1], PromptSpec("thing", masks=True)
    together = predictions_of(model, embeddings, images, dense, sizes, spec)
    assert all(len(p) > 1 for p in together)
    for i, image in enumerate(images):
        alone = predictions_of(
            model, embeddings[i : i + 1], [0], dense[image : image + 1], sizes[image : image + 1], spec
        )
        same(together[i], alone[0])
    order = [3, 1, 4, 0, 2]
    shuffled = predictions_of(model, embeddings[order], [images[i] for i in order], dense, sizes, spec)
    for i, prediction in zip(order, shuffled, strict=True):
        same(together[i], prediction)


def losses(model, embeddings, images, dense, boxes, masks=True):
    made = [[circle_mask(b) for b in row] for row in boxes] if masks else None
    raw = model(make_link(embeddings, images), dense)
    return model.loss(raw, make_targets(boxes, made))


@pytest.mark.parametrize("limit", [{"max_masks_per_object": 1}, {"max_masks_per_image": 3}])
def test_the_losses_of_a_batch_are_the_sums_over_its_parts(limit):
    """So that the loss of a global batch does not depend on how it is split over processes."""
    model = decoder(**limit)
    embeddings, dense = random_inputs(4)
    boxes = [[[4, 6, 28, 30], [36, 34, 60, 58]], [[30, 4, 58, 24], [2, 40, 20, 60]]] * 2
    together = losses(model, embeddings, [0, 0, 1, 1], dense, boxes)
    parts = [losses(model, embeddings[2 * i : 2 * i + 2], [0, 0], dense[i : i + 1], boxes[:2]) for i in range(2)]
    for name in ("heatmap", "match", "box", "mask"):
        torch.testing.assert_close(together[name].total, sum(p[name].total for p in parts))
        torch.testing.assert_close(together[name].count, sum(p[name].count for p in parts))
    torch.testing.assert_close(together["heatmap"].each.sum(), together["heatmap"].total)


def test_each_image_keeps_its_best_places():
    groups = torch.tensor([1, 0, 1, 1, 3, 0])
    values = torch.tensor([0.2, 0.5, 0.9, 0.2, 0.1, 0.7])
    assert best_of_each(groups, values, 2).tolist() == [5, 1, 2, 0, 4]
    assert best_of_each(groups, values, 1).tolist() == [5, 2, 4]
    assert best_of_each(groups[:0], values[:0], 2).tolist() == []


def trained_masks(boxes, per_image, monkeypatch):
    """[(object, place's centre)] of the masks in the loss of one image with one prompt for all of `boxes`."""
    model = decoder(stride=4, max_masks_per_object=5, max_masks_per_image=per_image)
    embeddings, dense = random_inputs(1, 1)
    raw = model(make_link(embeddings, [0]), dense)
    places, masks_at = [], model.masks_at
    monkeypatch.setattr(model, "masks_at", lambda raw, prompt, place, *rest: places.extend(place.tolist()) or masks_at(
        raw, prompt, place, *rest
    ))  # fmt: skip
    term = model.loss(raw, make_targets([boxes], [[circle_mask(b) for b in boxes]]))["mask"]
    assert float(term.count) == len(places) > 0
    trained = []
    for x, y in raw.centers[places].tolist():
        (owner,) = [i for i, (x1, y1, x2, y2) in enumerate(boxes) if x1 < x < x2 and y1 < y < y2]
        trained.append((owner, (x, y)))
    return trained


def test_crowded_images_train_some_masks_of_as_many_objects_as_they_may(monkeypatch):
    """Ten objects with five places each, and a limit of 8 masks an image: eight objects, others once they move."""
    boxes = [[x, y, x + 12, y + 12] for x in range(0, 60, 12) for y in (0, 32)]
    few = trained_masks(boxes, 8, monkeypatch)
    assert len({owner for owner, _ in few}) == len(few) == 8
    for owner, centre in few:  # of each the place in its middle
        assert centre == (boxes[owner][0] + 6, boxes[owner][1] + 6)
    moved = trained_masks([[c + 1 for c in box] for box in boxes], 8, monkeypatch)
    assert len({owner for owner, _ in moved}) == 8 and {owner for owner, _ in moved} != {owner for owner, _ in few}
    places = Counter(owner for owner, _ in trained_masks(boxes, 25, monkeypatch))
    assert sorted(places.values()) == [2] * 5 + [3] * 5  # each object has two before one has three
    every = Counter(owner for owner, _ in trained_masks(boxes, 1000, monkeypatch))
    assert every == dict.fromkeys(range(10), 5)


def test_numbers_scattered_over_boxes_differ_by_box_and_lie_below_one():
    values = scattered(torch.tensor([[x, y, x + 12.0, y + 12.0] for x in range(0, 60, 12) for y in (0, 32)]))
    assert ((values >= 0) & (values < 1)).all() and len(set(values.tolist())) == 10


def test_places_in_groups_count_from_zero_in_each():
    assert place_in_group(torch.tensor([0, 0, 0, 2, 2, 3])).tolist() == [0, 1, 2, 0, 1, 0]


def test_the_match_loss_is_the_cross_entropy_of_an_objects_places_over_the_other_prompts_of_its_image():
    """Written out place by place: three prompts of one image, one of another; two mean the same object."""
    model = decoder(match_weight=1.0)
    embeddings, dense = random_inputs(4)
    left, right, none = [4, 6, 28, 30], [36, 34, 60, 58], [0, 0, 0, 0]
    raw = model(make_link(embeddings, [0, 0, 0, 1]), dense)
    targets = make_targets([[left], [left], [right], [none]])
    targets.valid[3] = False
    term = model.loss(raw, targets)["match"]
    found = assign(
        raw.logits.sigmoid(), raw.boxes, raw.centers, targets.boxes, targets.valid, targets.crowd, 9, 8
    ).target  # fmt: skip
    expected, count = 0.0, 0
    rivals = {0: [2], 1: [2], 2: [0, 1]}  # same image, another object
    for prompt, place in torch.nonzero(found >= 0).tolist():
        own = raw.logits[prompt, place]
        others = torch.stack([own, *(raw.logits[r, place] for r in rivals[prompt])])
        expected, count = expected + torch.logsumexp(others, 0) - own, count + 1
    torch.testing.assert_close(term.total, expected)
    assert float(term.count) == count > 6
    alone = model.loss(model(make_link(embeddings[:1], [0]), dense), make_targets([[left]]))["match"]
    assert float(alone.total) == 0 and torch.isfinite(alone.total)


def test_crowds_cost_nothing():
    model = decoder()
    embeddings, dense = random_inputs(1, 1)
    raw = model(make_link(embeddings, [0]), dense)
    ignored = model.loss(raw, make_targets([[[0, 0, 64, 64]]], crowd=[[True]]))
    assert all(float(term.total) == 0 for term in ignored.values())
    background = make_targets([[[0, 0, 64, 64]]])
    background.valid[:] = False
    assert float(model.loss(raw, background)["heatmap"].total) > 0


def test_prompts_that_are_not_counted_cost_nothing():
    model = decoder()
    embeddings, dense = random_inputs(1, 1)
    targets = make_targets([[[8, 8, 40, 40]]])
    targets.counted[:] = False
    terms = model.loss(model(make_link(embeddings, [0]), dense), targets)
    assert all(float(term.total) == 0 for term in terms.values())


def test_unlabelled_keypoints_cost_nothing_and_labelled_ones_count():
    model = decoder()
    embeddings, dense = random_inputs(3, 1)
    raw = model(make_link(embeddings, [0] * 3, [-1, 0, 0]), dense)
    boxes = [[[8, 8, 40, 40], [20, 20, 60, 60]]] * 3
    points = np.zeros((3, 2, 3))
    points[1, 0], points[2, 1] = [10, 12, 2], [30, 50, 1]
    term = model.loss(raw, make_targets(boxes, keypoints=points))["keypoint"]
    assert float(term.count) == 2 and float(term.total) > 0
    term = model.loss(raw, make_targets(boxes, keypoints=points * [1, 1, 0]))["keypoint"]
    assert float(term.count) == float(term.total) == 0
    crowd = model.loss(raw, make_targets(boxes, keypoints=points, crowd=[[True, False]] * 3))["keypoint"]
    assert float(crowd.count) == 1


def test_no_targets_and_no_instances():
    model = decoder()
    embeddings, dense = random_inputs(2, 1)
    raw = model(make_link(embeddings, [0, 0]), dense)
    none = torch.zeros(2, 0, 4).tolist()
    terms = model.loss(raw, make_targets(none))
    assert float(terms["box"].total) == float(terms["mask"].total) == 0 and float(terms["heatmap"].total) > 0
    sum(t.total for t in terms.values()).backward()
    specs = [PromptSpec("a", masks=True), PromptSpec("b", keypoints=("head",))]
    for prediction in model.predict(raw, [Frame.fit((30, 50), SIDE)], specs, PredictSettings(1.1)):
        assert len(prediction) == 0 and prediction.boxes.size == (30, 50)


def test_pose_of_nothing_has_its_keypoint_names():
    model = decoder()
    embeddings, dense = random_inputs(2, 1)
    raw = model(make_link(embeddings, [0, 0], [-1, 0]), dense)
    (pose, none) = model.predict(
        raw, [Frame.fit((64, 64), SIDE)], [PromptSpec("a", keypoints=("head",)), None], PredictSettings(1.1)
    )
    assert none is None and pose.keypoints.xyv.shape == (0, 1, 3) and pose.keypoints.names == ("head",)


def test_no_prompts():
    model = decoder()
    _, dense = random_inputs(0, 1)
    raw = model(make_link(torch.zeros(0, LINK), []), dense)
    assert model.predict(raw, [Frame.fit((64, 64), SIDE)], [], PredictSettings()) == []


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_every_stride_builds_boxes_around_its_places(stride):
    model = decoder(stride=stride)
    embeddings, dense = random_inputs(1, 1)
    raw = model(make_link(embeddings, [0]), dense)
    n = SIDE // stride
    assert raw.shape == (n, n) and raw.logits.shape == (1, n * n)
    assert raw.centers[0].tolist() == [stride / 2] * 2 and raw.centers[n - 1].tolist() == [
        SIDE - stride / 2,
        stride / 2,
    ]
    x, y = raw.centers.unbind(-1)
    x1, y1, x2, y2 = raw.boxes[0].unbind(-1)
    assert ((x1 < x) & (x < x2) & (y1 < y) & (y < y2)).all()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_without_gradients_it_gives_the_same_without_a_map_per_prompt(num_layers):
    model = scrambled(decoder(num_layers=num_layers))
    embeddings, dense = random_inputs(5, 2)
    link = make_link(embeddings, [0, 1, 1, 0, 1])
    whole = model(link, dense)
    with torch.no_grad():
        parts = model(link, dense)
    assert whole.boxes is not None and parts.boxes is None
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.all_boxes(parts), whole.boxes, atol=1e-3, rtol=1e-4)
    prompts, places = torch.tensor([4, 0, 2]), torch.tensor([3, 40, 17])
    torch.testing.assert_close(
        model.boxes_at(parts, prompts, places), whole.boxes[prompts, places], atol=1e-3, rtol=1e-4
    )
    frames = [Frame.fit((SIDE, SIDE), SIDE)] * 2
    found, expected = (model.predict(raw, frames, [DETECT] * 5, PredictSettings(0.01)) for raw in (parts, whole))
    assert sum(map(len, expected)) > 5
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy, atol=1e-2)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_objects_in_neighbouring_places_are_all_detected():
    """Two of equal score, and one beside a better one, side by side: their boxes hardly overlap."""
    model = decoder(stride=4)
    with torch.no_grad():
        raw = model(make_link(*random_inputs(1, 1)[:1], [0]), random_inputs(1, 1)[1])
    raw.boxes = model.all_boxes(raw)
    size, (y, x) = raw.shape, (5, 6)
    logits = torch.full_like(raw.logits, -9.0)
    for column, logit in ((x, 2.0), (x + 1, 2.0), (x + 2, 1.0)):
        place = y * size[1] + column
        logits[0, place] = logit
        cx, cy = raw.centers[place].tolist()
        raw.boxes[0, place] = torch.tensor([cx - 2, cy - 4, cx + 2, cy + 4])
    raw.logits = logits
    (found,) = model.predict(raw, [Frame.fit((SIDE, SIDE), SIDE)], [DETECT], PredictSettings(0.3))
    assert len(found) == 3 and sorted(found.boxes.xyxy[:, 0].tolist()) == [24.0, 28.0, 32.0]
    doubled = raw.boxes.clone()
    doubled[0, y * size[1] + x + 1] = doubled[0, y * size[1] + x]  # the same object, said twice
    raw.boxes = doubled
    (found,) = model.predict(raw, [Frame.fit((SIDE, SIDE), SIDE)], [DETECT], PredictSettings(0.3))
    assert len(found) == 2


def naive_giou_loss(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - (overlap / union - (hull - union) / hull)


sizes = st.floats(0.5, 30)
boxes = st.tuples(st.floats(0, 50), st.floats(0, 50), sizes, sizes).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(max_examples=80, deadline=None)
@given(boxes, boxes)
def test_giou_equals_the_formula(a, b):
    got = giou_loss(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    assert float(got) == pytest.approx(naive_giou_loss(a, b), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(boxes, st.integers(0, 1000)), max_size=12, unique_by=lambda pair: pair[1]))
def test_nms_equals_a_naive_one(pairs):
    candidates, scores = [box for box, _ in pairs], [score / 1000 for _, score in pairs]
    left = sorted(range(len(candidates)), key=lambda i: -scores[i])
    kept = []
    for i in left:
        array = np.array([candidates[i], *[candidates[k] for k in kept]], np.float64)
        overlaps = Boxes(array[:1], (100, 100)).iou(Boxes(array[1:], (100, 100)))
        if not (overlaps > 0.5).any():
            kept.append(i)
    tensor = torch.tensor(candidates, dtype=torch.float32).reshape(-1, 4)
    assert greedy_nms(tensor, torch.tensor(scores, dtype=torch.float32), 0.5).tolist() == kept


def test_at_most_max_per_phrase_best_first():
    model = decoder()
    embeddings, dense = random_inputs(1, 1)
    raw = model(make_link(embeddings, [0]), dense)
    frame = Frame.fit((64, 64), SIDE)
    every = model.predict(raw, [frame], [DETECT], PredictSettings(0.0, 100))[0]
    few = model.predict(raw, [frame], [DETECT], PredictSettings(0.0, 3))[0]
    assert len(every) > 3 == len(few) and (np.diff(every.scores) <= 0).all()
    np.testing.assert_array_equal(few.scores, every.scores[:3])
    threshold = float(every.scores[2]) + 1e-7
    assert len(model.predict(raw, [frame], [DETECT], PredictSettings(threshold, 100))[0]) == 2
