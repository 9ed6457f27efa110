"""The expert of poses: skeletons by their prompts alone, whatever is beside them; and it learns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.gdino_tiny import LINK_CHANNELS, check_everything_learns, random_pixels
from support.tiny_models import scrambled
from support.unipose_tiny import figures, pose_link, pose_targets, tiny_decoder

from lumen_ray.decoders.base import PredictSettings, PromptSpec
from lumen_ray.decoders.dino.decoder import Groups
from lumen_ray.decoders.dino.denoising import make_denoising
from lumen_ray.decoders.dino.set_loss import find_objects
from lumen_ray.decoders.unipose import decoder as unipose
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.keypoints import FIGURE_KEYPOINTS
from lumen_ray.precision import autocast_context, cast_weights_
from lumen_ray.structures import Boxes
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, Pixels

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SIDE = 96


@pytest.fixture(scope="module")
def decoder():
    return scrambled(tiny_decoder(), std=0.05)


def run(decoder, link, pixels):
    with torch.no_grad():
        return decoder(link, pixels)


def results(raw, group: int) -> list[tuple[torch.Tensor, ...]]:
    """Query, seat, logit, box, keypoints and visibilities of every slot of a group in use."""
    out, last = [], raw.poses[-1]
    for n in torch.nonzero(raw.slots.valid[group]).flatten().tolist():
        exists = raw.skeletons.valid[raw.slots.prompt[group, n]]
        places = (raw.slots.query, raw.slots.seat, last.logits, last.boxes)
        out.append((*(v[group, n] for v in places), last.xy[group, n][exists], last.visible[group, n][exists]))
    return out


def assert_same_as_alone(decoder, link, pixels):
    raw = run(decoder, link, pixels)
    for number, group in enumerate(link.group.unique()):
        part, images = link.select_with_images(torch.nonzero(link.group == group).flatten())
        height, width = pixels.extents[images[0]].tolist()
        alone = run(decoder, part, Pixels(pixels.images[images, :, :height, :width], pixels.extents[images]))
        many, few = results(raw, number), results(alone, 0)
        assert len(many) == len(few) > 0
        for one, other in zip(many, few, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)


# Skeletons and batches


def test_skeletons_of_different_lengths_equal_single_groups(decoder):
    link = pose_link([[5, 2], [9], [0, 4, 1]])
    assert_same_as_alone(decoder, link, random_pixels([(SIDE, SIDE)] * 3, (SIDE, SIDE)))


def test_padding_of_images_changes_nothing(decoder):
    link = pose_link([[3], [1, 2], [4]])
    assert_same_as_alone(decoder, link, random_pixels([(96, 128), (70, 90), (96, 49)], (96, 128)))


def test_an_image_with_fewer_places_than_slots_equals_that_image_alone():
    decoder = scrambled(tiny_decoder(num_instances=40, num_queries=40), std=0.05)
    link, pixels = pose_link([[2], [2, 3]]), random_pixels([(24, 20), (SIDE, SIDE)], (SIDE, SIDE))
    assert_same_as_alone(decoder, link, pixels)
    valid = run(decoder, link, pixels).slots.valid
    assert 0 < valid[0].sum() < valid[1].sum() == 40


def test_groups_about_one_image_do_not_see_each_other(decoder):
    assert_same_as_alone(decoder, pose_link([[3], [3, 1], [2]], [1, 1, 0]), random_pixels([(64, 64)] * 2, (64, 64)))


@pytest.mark.parametrize("keypoints", [21, 68, 133])
def test_there_is_no_limit_to_the_keypoints_of_a_skeleton(decoder, keypoints):
    raw = run(decoder, pose_link([[keypoints]]), random_pixels([(64, 64)], (64, 64)))
    assert raw.poses[-1].xy.shape == (1, 6, keypoints, 2)
    assert raw.poses[-1].xy.isfinite().all() and raw.poses[-1].visible.isfinite().all()


def test_prompts_without_keypoints_are_detected_as_objects(decoder):
    raw = run(decoder, pose_link([[0, 0]]), random_pixels([(64, 64)], (64, 64)))
    assert raw.poses[-1].xy.shape == (1, 6, 0, 2) and raw.poses[-1].logits.isfinite().all()


def test_keypoints_are_identified_by_their_prompts_not_by_their_order(decoder):
    link, pixels = pose_link([[4]]), random_pixels([(64, 64)], (64, 64))
    order = torch.tensor([0, 3, 1, 4, 2])
    moved = SuperLink("unipose", link.embeddings[order], link.image_index, link.parent, link.group)
    one, other = run(decoder, link, pixels).poses[-1], run(decoder, moved, pixels).poses[-1]
    torch.testing.assert_close(one.boxes, other.boxes, **CLOSE)
    torch.testing.assert_close(one.xy[:, :, order[1:] - 1], other.xy, **CLOSE)
    assert (one.xy - other.xy).abs().max() > 1e-3


def test_a_keypoint_depends_on_its_instance():
    """With the released weights' start every instance begins with the same keypoints; a trained one may differ."""
    decoder = scrambled(tiny_decoder(), std=0.05)
    links, instances = torch.randn(1, 1, 3, 32).expand(1, 2, 3, 32), torch.randn(1, 2, 32)
    content = decoder.keypoint_start.content(links, instances)
    assert not torch.allclose(content[0, 0], content[0, 1])
    torch.nn.init.zeros_(decoder.keypoint_start.instance.weight)
    assert torch.equal(decoder.keypoint_start.content(links, instances), links)


def test_tables_of_sizes_count_by_slot_and_end():
    start = tiny_decoder(size_tables=(2, 1)).keypoint_start
    with torch.no_grad():
        start.size_tables[0].fill_(3.0)
        start.size_tables[1].fill_(-3.0)
        sizes = start.sizes(torch.zeros(1, 1, 5, 32))[0, 0, :, 0]
    torch.testing.assert_close(sizes, torch.tensor([3.0, 3.0, -3.0, 0.0, 0.0]).sigmoid())
    assert start.sizes(torch.zeros(1, 1, 1, 32)).shape == (1, 1, 1, 2)


def test_slots_are_the_likeliest_pairs():
    decoder = scrambled(tiny_decoder(num_instances=30), std=0.05)
    raw = run(decoder, pose_link([[2, 2]]), random_pixels([(64, 64)], (64, 64)))
    pairs = set(zip(raw.slots.query[0].tolist(), raw.slots.seat[0].tolist(), strict=True))
    assert len(pairs) == 30 > decoder.settings.num_queries  # of 20 queries and 2 prompts: some queries are in both
    assert {seat for _, seat in pairs} == {0, 1}


def test_layers_that_predict_keypoints_are_required():
    with pytest.raises(ValueError, match="box_layers 2"):
        UniPoseSettings(decoder_layers=2)


# Training


@pytest.fixture(scope="module")
def fitted():
    """A tiny model that knows two scenes by heart, in one of which two keypoints are hidden, in the other one."""
    link, pixels, targets = figures([192, 195], SIDE)
    decoder = tiny_decoder(
        learned_class_scale=True, box_layers=1, decoder_layers=3, visible_weight=4.0, denoising_queries=8
    )
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    torch.manual_seed(0)  # what the noisy copies are drawn from
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 if step < 120 else 6e-4
        total = sum(term.total / term.count for term in decoder.losses(link, pixels, targets).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    return decoder.eval(), link, pixels, targets


def compared(decoder, link, pixels, targets):
    """Pixel errors [I, 5], predicted visibilities and true ones of every figure, which are the best predictions."""
    raw = run(decoder, link, pixels)
    prompts = [PromptSpec("figure", keypoints=FIGURE_KEYPOINTS) if p < 0 else None for p in link.parent.tolist()]
    found = decoder.predict(raw, [Frame.fit((SIDE, SIDE), SIDE)] * 2, prompts, PredictSettings(0.05))
    errors, visible, truth = [], [], []
    for p in torch.nonzero(link.parent < 0).flatten().tolist():
        children = torch.nonzero(link.parent == p).flatten()
        count = int(targets.valid[p].sum())
        for g in range(count):
            overlaps = Boxes([targets.boxes[p, g].tolist()], (SIDE, SIDE)).iou(found[p].boxes[:count])[0]
            assert overlaps.max() > 0.7
            own, wanted = found[p].keypoints.xyv[overlaps.argmax()], targets.keypoints[children, g].numpy()
            errors.append(np.linalg.norm(own[:, :2] - wanted[:, :2], axis=1))
            visible.append(own[:, 2])
            truth.append(wanted[:, 2])
    return np.stack(errors), np.stack(visible), np.stack(truth)


def test_it_learns_two_scenes_by_heart(fitted):
    errors = compared(*fitted)[0]
    assert errors.shape == (5, 5)
    assert errors.mean() < 2.5 and errors.max() < 8  # pixels; the figures are some 30 high


def test_a_hidden_keypoint_gets_a_lower_score(fitted):
    _, visible, truth = compared(*fitted)
    assert (truth == 1).sum() == 3
    assert visible[truth == 1].max() < 0.6 < visible[truth == 2].min()


def test_bfloat16_finds_the_same(fitted):
    exact = compared(*fitted)
    decoder, link, pixels, targets = fitted
    with torch.autocast("cpu", torch.bfloat16):
        low = compared(*fitted)
        losses = decoder.losses(link, pixels, targets)
    assert not np.array_equal(exact[0], low[0])
    assert np.abs(exact[0] - low[0]).max() < 1.5 and np.abs(exact[1] - low[1]).max() < 0.2
    sum(term.total for term in losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())
    decoder.zero_grad()


def test_weights_in_bfloat16_find_the_same(fitted):
    """As a model answers in bf16: what it finds of figures some 30 high is a pixel off at most."""
    exact, low = compared(*fitted), copy.deepcopy(fitted[0])
    cast_weights_(low, "bfloat16")
    assert low.trunk.encoder.layers[0].deformable_layer.fc1.weight.dtype == torch.bfloat16
    assert low.trunk.enc_output_norm.weight.dtype == torch.float32
    with autocast_context(True, torch.device("cpu")):
        found = compared(low, *fitted[1:])
    assert not np.array_equal(exact[0], found[0])
    assert np.abs(exact[0] - found[0]).max() < 1.5 and np.abs(exact[1] - found[1]).max() < 0.2


@pytest.mark.parametrize("learned", [False, True])
def test_every_parameter_and_every_link_gets_a_gradient(learned):
    link, pixels, targets = figures([192, 195], SIDE)
    settings = {"num_instances": 40, "size_tables": (3, 1)}  # all queries with all prompts
    decoder = scrambled(tiny_decoder(learned_class_scale=learned, **settings), std=0.05).train()
    check_everything_learns(decoder, link, pixels, targets)


def test_denoising_does_not_tell_slots_the_answer():
    link, pixels, targets = figures([192, 195], SIDE)
    decoder = scrambled(tiny_decoder(), std=0.05)
    groups = Groups.of(link, pixels)
    wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
    with torch.no_grad():
        without, with_ = (
            decoder(link, pixels),
            decoder._decode(link, decoder._extract_features(pixels, groups), groups, wanted),
        )
    assert len(with_.denoised) == decoder.settings.decoder_layers and with_.denoised[-1].boxes.shape[1] > 0
    assert torch.equal(without.slots.query, with_.slots.query)
    for one, other in zip(without.poses, with_.poses, strict=True):
        for name, value in vars(one).items():
            torch.testing.assert_close(value, getattr(other, name), **CLOSE)


def test_rounds_of_denoising_do_not_read_each_other_in_any_layer(monkeypatch):
    link, pixels, targets = figures([192, 195], SIDE)
    decoder = scrambled(tiny_decoder(denoising_queries=12), std=0.05)
    groups = Groups.of(link, pixels)
    wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
    found = []
    for change in (0.0, 1.0):

        def changed(*args, change=change):
            denoising = make_denoising(*args)
            denoising.content = denoising.content + change * (denoising.round == 0)[..., None]
            return denoising

        monkeypatch.setattr(unipose, "make_denoising", changed)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(decoder._decode(link, decoder._extract_features(pixels, groups), groups, wanted))
    rounds = found[0].denoising.round
    assert rounds.max() >= 1
    for one, other in zip(found[0].denoised, found[1].denoised, strict=True):
        torch.testing.assert_close(one.boxes[rounds > 0], other.boxes[rounds > 0], **CLOSE)
        assert not torch.allclose(one.boxes[rounds == 0], other.boxes[rounds == 0])


@pytest.mark.parametrize("counted", [True, False])
def test_a_batch_without_any_object_is_finite(counted):
    link, pixels = pose_link([[5, 2], [3]]), random_pixels([(64, 64)] * 2, (64, 64))
    targets = pose_targets(link, [[]] * len(link), [[]] * len(link))
    targets.counted &= counted
    decoder = tiny_decoder()
    losses = decoder.losses(link, pixels, targets)
    sum(term.total for term in losses.values()).backward()
    assert set(losses) == set(decoder.loss_names)
    assert all(term.total.isfinite() and term.count == 0 for term in losses.values())
    assert (losses["unipose_class"].total > 0) == counted  # what is found nowhere is learned, too
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


def test_losses_of_a_batch_are_the_sum_of_its_parts():
    link, pixels, targets = figures([192, 195], SIDE)
    decoder = scrambled(tiny_decoder(), std=0.05)
    with torch.no_grad():
        whole = decoder.loss(decoder(link, pixels), targets)
        parts = []
        for image in (0, 1):
            members = torch.nonzero(link.image_index == image).flatten()
            part, images = link.select_with_images(members)
            raw = decoder(part, Pixels(pixels.images[images], pixels.extents[images]))
            own = {name: value[members] for name, value in vars(targets).items() if name != "masks"}
            parts.append(decoder.loss(raw, type(targets)(masks=targets.masks, **own)))
    for name, term in whole.items():
        torch.testing.assert_close(term.total, sum(part[name].total for part in parts), rtol=1e-4, atol=1e-4)
        assert term.count == sum(part[name].count for part in parts)
    each = whole["unipose_class"].each
    assert not each[link.parent >= 0].any()
    torch.testing.assert_close(each.sum(), whole["unipose_class"].total)


def test_nothing_is_learned_from_prompts_that_do_not_count():
    link, pixels, targets = figures([195], SIDE)  # red and green figures
    decoder = scrambled(tiny_decoder(), std=0.05)
    targets.counted[link.parent < 0] = torch.tensor([True, False])
    with torch.no_grad():
        losses = decoder.loss(decoder(link, pixels), targets)
    assert losses["unipose_class"].count == 2  # two are red
    each = losses["unipose_class"].each[link.parent < 0]
    assert each[0] > 0 and each[1] == 0


# Predictions


def test_predictions_lie_in_the_stored_image(decoder):
    link, pixels = pose_link([[3, 0], [2]]), random_pixels([(48, 96), (96, 60)], (96, 96))
    frames = [Frame((100, 200), 0.48, (96, 96)), Frame((80, 50), 1.2, (96, 96))]
    raw = run(decoder, link, pixels)
    raw.poses[-1].xy[0, :, 0] = torch.tensor([1.5, -0.5])
    prompts = [PromptSpec("a", keypoints=("x", "y", "z")), None, None, None, PromptSpec("b")]
    prompts += [PromptSpec("c", keypoints=("u", "v")), None, None]
    found = decoder.predict(raw, frames, prompts, PredictSettings(0.0, 5))
    assert [f is None for f in found] == [p is None for p in prompts]
    a, b, c = found[0], found[4], found[5]
    assert len(a) + len(b) == 6 or len(a) == 5 or len(b) == 5  # slots of the first group
    assert len(c) == 5 and b.keypoints is None
    for prediction, size, names in ((a, (100, 200), ("x", "y", "z")), (c, (80, 50), ("u", "v"))):
        height, width = size
        assert (np.diff(prediction.scores) <= 0).all() and prediction.boxes.size == size
        assert prediction.keypoints.names == names and prediction.keypoints.size == size
        assert prediction.keypoints.xyv.min() >= 0
        assert (prediction.keypoints.xyv[..., :2] <= [width, height]).all() and prediction.keypoints.xyv[
            ..., 2
        ].max() < 1
    assert (a.keypoints.xyv[:, 0, :2] == [200, 0]).all()
    best = raw.poses[-1].logits[1].argmax()
    wanted = raw.poses[-1].xy[1, best, :2] * torch.tensor([60, 96]) / 1.2
    np.testing.assert_allclose(c.keypoints.xyv[0, :, :2], np.clip(wanted, 0, [50, 80]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(c.keypoints.xyv[0, :, 2], raw.poses[-1].visible[1, best, :2].sigmoid(), rtol=1e-5)


def test_the_threshold_holds(decoder):
    link, pixels = pose_link([[2]]), random_pixels([(64, 64)], (64, 64))
    raw, frames, prompts = (
        run(decoder, link, pixels),
        [Frame.fit((64, 64), 64)],
        [PromptSpec("a", keypoints=("x", "y"))],
    )
    prompts += [None, None]
    every = decoder.predict(raw, frames, prompts, PredictSettings(0.0))[0]
    assert len(every) == decoder.settings.num_instances
    some = decoder.predict(raw, frames, prompts, PredictSettings(float(every.scores[2])))[0]
    assert len(some) == 3 and np.array_equal(some.scores, every.scores[:3])
    none = decoder.predict(raw, frames, prompts, PredictSettings(1.1))[0]
    assert len(none) == 0 and none.keypoints.xyv.shape == (0, 2, 3)


def test_a_link_as_wide_as_the_decoder_is_taken_as_it_is():
    decoder = tiny_decoder()
    assert decoder.link_proj.in_features == decoder.keypoint_proj.in_features == LINK_CHANNELS
    wide = type(decoder)(decoder.settings, decoder.settings.hidden_size)
    assert isinstance(wide.link_proj, torch.nn.Identity) and isinstance(wide.keypoint_proj, torch.nn.Identity)
