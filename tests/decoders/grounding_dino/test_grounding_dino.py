"""The expert detector: what is beside a prompt or an image in a batch changes nothing, and it learns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.gdino_tiny import (
    LINK_CHANNELS,
    check_everything_learns,
    random_link,
    random_pixels,
    targets_of,
    tiny_decoder,
)
from support.tiny_models import scrambled

from lumen_ray.decoders.base import PredictSettings, PromptSpec
from lumen_ray.decoders.dino.decoder import Groups
from lumen_ray.decoders.dino.denoising import make_denoising
from lumen_ray.decoders.dino.set_loss import find_objects
from lumen_ray.precision import autocast_context, cast_weights_
from lumen_ray.structures import Boxes
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, Pixels

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SMALL = {"mask_points": 64, "denoising_queries": 16, "num_queries": 10}


@pytest.fixture(scope="module")
def decoder():
    return scrambled(tiny_decoder(), std=0.05)


def alone(link, pixels, group):
    """One group by itself, its image without padding."""
    part, images = link.select_with_images(torch.nonzero(link.group == group).flatten())
    height, width = pixels.extents[images[0]].tolist()
    return part, Pixels(pixels.images[images, :, :height, :width], pixels.extents[images])


def assert_same_as_alone(decoder, link, pixels):
    with torch.no_grad():
        raw = decoder(link, pixels)
        features = decoder.mask_features(raw)
        for group in range(len(raw.groups.image)):
            one = decoder(*alone(link, pixels, group))
            queries, prompts = one.layers[-1].logits.shape[1:]
            assert raw.query_valid[group].sum() == one.query_valid.sum()
            valid = one.query_valid[0]
            for many, few in ((raw.encoder, one.encoder), (raw.layers[-1], one.layers[-1])):
                torch.testing.assert_close(many.logits[group, :queries, :prompts][valid], few.logits[0][valid], **CLOSE)
                torch.testing.assert_close(many.boxes[group, :queries][valid], few.boxes[0][valid], **CLOSE)
            masks = decoder.mask_features(one)[0]
            torch.testing.assert_close(features[group, :, : masks.shape[1], : masks.shape[2]], masks, **CLOSE)


def test_groups_of_different_sizes_equal_single_groups(decoder):
    assert_same_as_alone(decoder, random_link([5, 1, 3]), random_pixels([(96, 96)] * 3, (96, 96)))


def test_padding_of_images_changes_nothing(decoder):
    assert_same_as_alone(decoder, random_link([2, 3, 2]), random_pixels([(96, 128), (70, 90), (96, 49)], (96, 128)))


def test_an_image_with_fewer_places_than_queries_equals_that_image_alone(decoder):
    assert_same_as_alone(decoder, random_link([2, 2]), random_pixels([(96, 96), (24, 20)], (96, 96)))


def test_a_batch_of_equal_images_that_leave_some_of_the_input_empty(decoder):
    assert_same_as_alone(decoder, random_link([2, 2]), random_pixels([(70, 90)] * 2, (96, 128)))


def test_groups_about_one_image_share_backbone_features(decoder, monkeypatch):
    link, pixels = random_link([2, 3, 1], images=[1, 1, 0]), random_pixels([(64, 64)] * 3, (64, 64))
    seen, forward = [], decoder.trunk.backbone.forward
    monkeypatch.setattr(decoder.trunk.backbone, "forward", lambda images: seen.append(len(images)) or forward(images))
    decoder(link, pixels)
    assert seen == [2]  # the third image has no prompt
    assert_same_as_alone(decoder, link, pixels)


def test_there_is_no_limit_to_the_prompts_of_a_group(decoder):
    with torch.no_grad():
        raw = decoder(random_link([300]), random_pixels([(64, 64)], (64, 64)))
    assert raw.layers[-1].logits.shape == (1, 20, 300)
    assert raw.layers[-1].logits.isfinite().all()


def test_keypoint_prompts_take_no_part(decoder):
    link, pixels = random_link([3, 2]), random_pixels([(64, 64)] * 2, (64, 64))
    order = torch.tensor([0, 0, 1, 2, 3, 4])  # a keypoint prompt behind the first
    parent = torch.tensor([-1, 0, -1, -1, -1, -1])
    more = SuperLink("grounding_dino", link.embeddings[order], link.image_index[order], parent, link.group[order])
    more.embeddings[1] = 9.0
    with torch.no_grad():
        few, many = decoder(link, pixels), decoder(more, pixels)
    assert torch.equal(few.layers[-1].logits, many.layers[-1].logits)
    prompts = [PromptSpec(str(i)) for i in range(6)]
    found = decoder.predict(many, [Frame.fit((64, 64), 64)] * 2, prompts, PredictSettings(0.0))
    assert found[1] is None
    assert [p.phrase for p in found if p is not None] == ["0", "2", "3", "4", "5"]


# Training

BOXES = [[8.0, 8.0, 32.0, 40.0], [36.0, 20.0, 60.0, 56.0], [10.0, 30.0, 50.0, 60.0]]


def scene():
    """Two pictures with a red and a green, and a blue rectangle; prompts for red, green and red, green, blue."""
    images = torch.full((2, 3, 64, 64), 40, dtype=torch.uint8)
    for image, (x1, y1, x2, y2), channel in zip((0, 0, 1), (map(int, box) for box in BOXES), range(3), strict=True):
        images[image, :, y1:y2, x1:x2] = 30
        images[image, channel, y1:y2, x1:x2] = 230
    link = random_link([2, 3])
    words = torch.randn(3, LINK_CHANNELS, generator=torch.Generator().manual_seed(3))
    link.embeddings = words[[0, 1, 0, 1, 2]]
    targets = targets_of([[BOXES[0]], [BOXES[1]], [], [], [BOXES[2]]], side=64, masks=True)
    return link, Pixels(images, torch.tensor([[64, 64]] * 2)), targets


def test_it_learns_two_pictures_by_heart():
    link, pixels, targets = scene()
    decoder = tiny_decoder(1, learned_class_scale=True, **SMALL)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for _ in range(80):
        total = sum(term.total / term.count for term in decoder.losses(link, pixels, targets).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    decoder.eval()
    with torch.no_grad():
        raw = decoder(link, pixels)
    prompts = [PromptSpec(name, masks=True) for name in ("red", "green", "red", "green", "blue")]
    frames = [Frame.fit((64, 64), 64)] * 2
    found = decoder.predict(raw, frames, prompts, PredictSettings(0.0, 1))
    for prompt, box in zip((0, 1, 4), BOXES, strict=True):
        x1, y1, x2, y2 = map(int, box)
        assert Boxes([box], (64, 64)).iou(found[prompt].boxes)[0, 0] > 0.6
        mask, wanted = found[prompt].masks.to_arrays()[0], np.zeros((64, 64), bool)
        wanted[y1:y2, x1:x2] = True
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.6
    assert min(found[p].scores[0] for p in (0, 1, 4)) > 2 * max(found[p].scores[0] for p in (2, 3))


@pytest.mark.parametrize("learned", [False, True])
def test_every_parameter_and_every_link_gets_a_gradient(learned):
    link, pixels = random_link([2, 3]), random_pixels([(96, 96)] * 2, (96, 96))
    targets = targets_of([[BOXES[0]], [BOXES[1]], [], [], [BOXES[2]]], masks=True)
    decoder = scrambled(tiny_decoder(learned_class_scale=learned, **SMALL), std=0.05).train()
    check_everything_learns(decoder, link, pixels, targets)


def test_the_encoder_head_is_trained_by_its_loss():
    link, pixels, targets = scene()
    decoder = scrambled(tiny_decoder(**SMALL), std=0.05)
    raw = decoder(link, pixels)
    raw.layers = []
    sum(term.total for term in decoder.loss(raw, targets).values()).backward()
    assert decoder.trunk.enc_output.weight.grad.any()
    assert all(layer.weight.grad.any() for layer in decoder.trunk.encoder_output_bbox_embed.layers)
    assert decoder.bbox_embed.layers[0].weight.grad is None


def test_denoising_does_not_tell_matching_queries_the_answer():
    link, pixels, targets = scene()
    decoder = scrambled(tiny_decoder(**SMALL), std=0.05)
    groups = Groups.of(link, pixels)
    wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
    with torch.no_grad():
        without = decoder(link, pixels)
        with_ = decoder._decode(link, decoder._extract_features(pixels, groups), groups, wanted)
    assert with_.denoised[-1].boxes.shape[1] > 0 and not without.denoised[-1].boxes.numel()
    for one, other in zip(without.layers, with_.layers, strict=True):
        torch.testing.assert_close(one.logits, other.logits, **CLOSE)
        torch.testing.assert_close(one.boxes, other.boxes, **CLOSE)


def test_a_group_without_objects_has_no_denoising_queries_and_no_boxes():
    link, pixels, _ = scene()
    targets = targets_of([[BOXES[0]], [], [], [], []], side=64)
    decoder = tiny_decoder(**SMALL)
    groups = Groups.of(link, pixels)
    wanted = find_objects(targets, groups.objects, groups.seats, groups.sizes)
    links = torch.zeros(2, 3, 32)
    denoising = make_denoising(wanted, links, torch.ones(2, 3, dtype=torch.bool), decoder.settings)
    assert denoising.weight[0].sum() == 2 and denoising.weight[1].sum() == 0
    losses = decoder.losses(link, pixels, targets)
    assert losses["gdino_box"].count == 1 and all(term.total.isfinite() for term in losses.values())


@pytest.mark.parametrize("counted", [True, False])
def test_a_batch_without_any_object_is_finite(counted):
    link, pixels, _ = scene()
    targets = targets_of([[]] * 5, side=64)
    targets.counted[:] = counted
    decoder = tiny_decoder(**SMALL)
    losses = decoder.losses(link, pixels, targets)
    sum(term.total for term in losses.values()).backward()
    assert set(losses) == set(decoder.loss_names)
    assert all(term.total.isfinite() and term.count == 0 for term in losses.values())
    assert (losses["gdino_class"].total > 0) == counted  # what is found nowhere is learned, too
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


def test_losses_of_a_batch_are_the_sum_of_its_parts(decoder):
    link, pixels, targets = scene()
    targets.mask_index[:] = -1  # their points are drawn at random
    with torch.no_grad():
        whole = decoder.loss(decoder(link, pixels), targets)
        parts = []
        for members in (torch.tensor([0, 1]), torch.tensor([2, 3, 4])):
            part, images = link.select_with_images(members)
            own = {f.name: getattr(targets, f.name)[members] for f in dataclasses.fields(targets) if f.name != "masks"}
            raw = decoder(part, Pixels(pixels.images[images], pixels.extents[images]))
            parts.append(decoder.loss(raw, dataclasses.replace(targets, **own)))
    for name in ("gdino_class", "gdino_box"):
        torch.testing.assert_close(whole[name].total, sum(p[name].total for p in parts), rtol=1e-4, atol=1e-4)
        assert whole[name].count == sum(p[name].count for p in parts)
    torch.testing.assert_close(whole["gdino_class"].each, torch.cat([p["gdino_class"].each for p in parts]), **CLOSE)
    torch.testing.assert_close(whole["gdino_class"].each.sum(), whole["gdino_class"].total)


def test_look_forward_twice_trains_a_layer_by_the_next():
    link, pixels, _ = scene()
    grads = {}
    for twice in (False, True):
        decoder = scrambled(tiny_decoder(look_forward_twice=twice, **SMALL), std=0.05)
        raw = decoder(link, pixels)
        first = decoder.trunk.decoder.layers[0].fc2.weight
        # the last layer's boxes, with its own hidden state held: what is left is the way over the first layer's boxes
        hidden = raw.layers[0].hidden
        grads[twice] = torch.autograd.grad(raw.layers[1].boxes.sum(), first, retain_graph=True)[0]
        assert hidden.requires_grad
    assert not torch.allclose(grads[False], grads[True])


def test_nothing_is_dropped_by_default():
    link, pixels, _ = scene()
    decoder = scrambled(tiny_decoder(**SMALL), std=0.05)
    with torch.no_grad():
        evaluated = decoder(link, pixels).layers[-1]
        trained = decoder.train()(link, pixels).layers[-1]
        dropping = scrambled(tiny_decoder(dropout=0.5, **SMALL), std=0.05).train()(link, pixels).layers[-1]
    assert torch.equal(evaluated.logits, trained.logits)
    assert not torch.allclose(evaluated.logits, dropping.logits)


def test_bfloat16_is_close_to_float32():
    link, pixels, targets = scene()
    decoder = scrambled(tiny_decoder(learned_class_scale=True, **SMALL), std=0.05)
    found = {}
    for low in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            memory = decoder(link, pixels).memory
            losses = decoder.losses(link, pixels, targets)
        sum(term.total for term in losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in decoder.parameters())
        found[low] = memory.vision.float(), memory.links.float(), {n: t.total.item() for n, t in losses.items()}
    for exact, low in zip(found[False][:2], found[True][:2], strict=True):
        assert not torch.equal(exact, low) and (exact - low).abs().mean() < 0.02 * exact.abs().mean()
    for name, value in found[False][2].items():  # another place may win a query by rounding
        assert abs(found[True][2][name] - value) < 0.3 * value, name


def test_weights_in_bfloat16_are_close_to_float32():
    link, pixels, _ = scene()
    decoder = scrambled(tiny_decoder(learned_class_scale=True, **SMALL), std=0.05)
    with torch.no_grad():
        exact = decoder(link, pixels)
        cast_weights_(decoder, "bfloat16")
        with autocast_context(True, torch.device("cpu")):
            low = decoder(link, pixels)
    for one, other in ((exact.memory.vision, low.memory.vision), (exact.memory.links, low.memory.links)):
        assert not torch.equal(one, other.float()) and (one - other.float()).abs().mean() < 0.02 * one.abs().mean()
    assert {v.dtype for layer in low.layers for v in (layer.logits, layer.boxes)} == {torch.float32}
    same = (exact.scores().amax(-1).sort().values - low.scores().amax(-1).sort().values).abs()
    assert same.max() < 0.02  # another place may win a query by rounding


# Predictions


def test_predictions_lie_in_the_stored_image(decoder):
    link, pixels = random_link([2, 1]), random_pixels([(48, 96), (96, 60)], (96, 96))
    frames = [Frame((100, 200), 0.48, (96, 96)), Frame((80, 50), 1.2, (96, 96))]
    with torch.no_grad():
        raw = decoder(link, pixels)
    prompts = [PromptSpec("a", masks=True), PromptSpec("b"), PromptSpec("c", masks=True)]
    found = decoder.predict(raw, frames, prompts, PredictSettings(0.0, 7))
    assert [p.phrase for p in found] == ["a", "b", "c"] and [len(p) for p in found] == [7, 7, 7]
    assert found[1].masks is None
    for prediction, size in zip(found, ((100, 200), (100, 200), (80, 50)), strict=True):
        assert (np.diff(prediction.scores) <= 0).all() and prediction.boxes.size == size
        assert prediction.boxes.xyxy.min() >= 0 and (prediction.boxes.xyxy[:, 2:] <= [size[1], size[0]]).all()
        if prediction.masks is not None:
            assert prediction.masks.to_arrays().shape == (7, *size)
    best = raw.scores()[0, :, 0].argmax()
    box = raw.layers[-1].boxes[0, best]
    wanted = [(box[0] - box[2] / 2) * 96, (box[1] - box[3] / 2) * 48, (box[0] + box[2] / 2) * 96]
    wanted = np.clip(np.array(wanted) / 0.48, 0, [200, 100, 200])
    np.testing.assert_allclose(found[0].boxes.xyxy[0, :3], wanted, rtol=1e-4, atol=1e-3)


def test_masks_do_not_change_scores_and_the_threshold_holds(decoder):
    link, pixels = random_link([2]), random_pixels([(64, 64)], (64, 64))
    with torch.no_grad():
        raw = decoder(link, pixels)
    frames = [Frame.fit((64, 64), 64)]
    plain, masked = (
        decoder.predict(raw, frames, [PromptSpec("a", masks=m), PromptSpec("b", masks=m)], PredictSettings(0.0))
        for m in (False, True)
    )
    middle = float(np.median(plain[0].scores))
    some = decoder.predict(raw, frames, [PromptSpec("a"), PromptSpec("b")], PredictSettings(middle))
    for one, other in zip(plain, masked, strict=True):
        assert np.array_equal(one.scores, other.scores) and len(one) == decoder.settings.num_queries
    assert len(some[0]) == (plain[0].scores >= middle).sum() < len(plain[0])
    none = decoder.predict(raw, frames, [PromptSpec("a", masks=True), PromptSpec("b")], PredictSettings(1.1))
    assert len(none[0]) == 0 and len(none[0].masks) == 0
