"""Tasks served by either family of decoders: which one is called, and that its answers do not depend on neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.tiny_models import (
    EXPERTS,
    SIDE,
    scene_batch,
    tiny_folder,
    tiny_loaded,
    tiny_model,
    tiny_settings,
    tiny_tokenizer,
)

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import merge
from lumen_ray.inference.request import make_request
from lumen_ray.keypoints import FIGURE_KEYPOINTS
from lumen_ray.structures import Region
from lumen_ray.tasks import UNDERSTANDING

DINO = {"grounding_dino": EXPERTS["grounding_dino"]}
PICTURES = [decode(scenes.scene_row(3, n, SIDE)["image"]) for n in range(3)]
DETECT = make_request("detect", classes=["red circle", "blue square", "green triangle"])
REFER = make_request("refer", text="the circle at the left")
SEGMENT = make_request("segment", classes=["red circle"])


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_loaded(decoders={"detect": "grounding_dino", "segment": "grounding_dino"}, **DINO))


def boxes(answer):
    return [(p.phrase, p.boxes.xyxy, p.scores) for p in answer.predictions]


def same(one, other):
    for (phrase, a, scores), (wanted, b, others) in zip(boxes(one), boxes(other), strict=True):
        assert phrase == wanted and np.allclose(a, b, atol=1e-2) and np.allclose(scores, others, atol=1e-4)


def test_a_task_goes_to_the_decoder_the_settings_name(engine):
    out = engine.trunk.links(PICTURES[:1], [[DETECT, REFER]])
    assert {name: [spec.phrase for spec in part.prompts] for name, part in out.decoder_inputs.items()} == {
        "grounding_dino": list(DETECT.phrases), "lumen": [REFER.text],
    }  # fmt: skip
    assert out.dense is not None and not out.decoder_inputs["lumen"].pixels
    assert [tuple(image.shape) for image in out.decoder_inputs["grounding_dino"].pixels] == [(3, SIDE, SIDE)] * 3


def test_who_serves_a_task_can_be_chosen_when_the_model_is_loaded(tmp_path, engine):
    folder = tiny_folder(tmp_path, decoders={"segment": "grounding_dino"}, **DINO)
    own, chosen = Engine.load(folder), Engine.load(folder, decoders={"detect": "grounding_dino", "refer": "lumen"})
    assert own.chosen_decoders == {} and chosen.chosen_decoders == {"detect": "grounding_dino"}
    assert own.version == chosen.version
    serving = {n: {p.decoder: p.task for p in e.trunk.links(PICTURES[:1], [[DETECT, SEGMENT]]).plans[0]}
               for n, e in (("own", own), ("chosen", chosen))}  # fmt: skip
    assert serving["own"] == {"lumen": "detect", "grounding_dino": "segment"}
    assert list(serving["chosen"]) == ["grounding_dino"]  # detect as chosen, segment as the folder says
    asked = [[DETECT]]
    expected = engine.run(PICTURES[:1], asked, score_threshold=0.0)[0][0]
    same(chosen.run(PICTURES[:1], asked, score_threshold=0.0)[0][0], expected)


@pytest.mark.parametrize(
    ("decoders", "says"),
    [
        ({"detect": "unipose"}, "'unipose' cannot serve task 'detect'; this model's for it: lumen, grounding_dino"),
        ({"generate": "lumen"}, "'lumen' cannot serve task 'generate'; this model has none for it"),
        ({"caption": "lumen"}, "'lumen' cannot serve task 'caption'; this model has none for it"),
        ({"detct": "lumen"}, "unknown task 'detct'; did you mean 'detect'?"),
    ],
)
def test_a_choice_that_cannot_serve_is_refused_as_in_the_settings(tmp_path, decoders, says):
    folder = tiny_folder(tmp_path, **DINO)
    with pytest.raises(UserError) as caught:
        Engine.load(folder, decoders=decoders)
    assert str(caught.value).startswith(f"{folder}: ") and says in str(caught.value)
    assert caught.value.reason == "invalid_config"


def test_requests_and_images_do_not_change_each_others_answers(engine):
    """The classes of one request attend to each other, not to those of another."""
    asked = [[DETECT, REFER, SEGMENT], [SEGMENT, DETECT], [REFER]]
    together = engine.run(PICTURES, asked, score_threshold=0.0)
    for picture, requests, answers in zip(PICTURES, asked, together, strict=True):
        assert len(answers[0].predictions[0]) > 0
        for request, answer in zip(requests, answers, strict=True):
            same(engine.run([picture], [[request]], score_threshold=0.0)[0][0], answer)


def test_masks_come_at_the_size_of_the_image(engine):
    wide = PICTURES[0][: SIDE // 2]
    (prediction,) = engine.run([wide], [[SEGMENT]], score_threshold=0.0)[0][0].predictions
    assert prediction.masks.size == wide.shape[:2] and len(prediction.masks) == len(prediction) > 0


def test_outputs_of_several_calls_are_decoded_as_one(engine):
    outputs = [engine.trunk.links([picture], [[DETECT, SEGMENT]]) for picture in PICTURES]
    decoder = engine.decoders["grounding_dino"]
    together = iter(decoder.predict(merge(outputs)))
    for output in outputs:
        for alone in decoder.predict(output):
            found = next(together)
            assert np.allclose(alone.scores, found.scores, atol=1e-4)


def test_both_families_learn_from_one_pass():
    model = tiny_model(**DINO)
    losses = model(scene_batch(2))
    assert {"heatmap", "gdino_class", "gdino_box", "gdino_mask"} <= set(losses)
    sum(losses[name].total for name in ("gdino_class", "gdino_box")).backward()
    assert model.trunk.queries.queries["perception"].grad.abs().sum() > 0
    head = model.trunk.link_heads["grounding_dino"].mlp[0].weight
    assert head.grad.abs().sum() > 0


def test_a_decoder_that_a_step_does_not_train_gets_no_gradient():
    """So that an optimizer leaves it alone: with gradients of zero AdamW would go on where it was heading."""
    model = tiny_model(**DINO)
    losses = model(replace(scene_batch(2), decoders=["lumen"]))
    assert "heatmap" in losses and not [name for name in losses if name.startswith("gdino")]
    sum(term.total for term in losses.values()).backward()
    for part in (model.decoders, model.trunk.link_heads):
        assert all(p.grad is None for p in part["grounding_dino"].parameters())
        assert all(p.grad is not None for p in part["lumen"].parameters())


def test_weights_that_only_other_tasks_use_get_no_gradient():
    model = tiny_model(**DINO)
    asked = ("detect", "refer")
    losses = model(replace(scene_batch(2, tasks=asked), decoders=["grounding_dino"], possible_tasks=asked))
    sum(term.total for term in losses.values()).backward()
    trunk = model.trunk
    for part in (trunk.dense, trunk.regions):
        assert all(p.grad is None for p in part.parameters())
    model.zero_grad()
    losses = model(replace(scene_batch(2, tasks=asked), decoders=["lumen"], possible_tasks=asked))
    sum(term.total for term in losses.values()).backward()
    for name, p in model.decoders["lumen"].named_parameters():
        assert (p.grad is None) == name.startswith("pose."), name
    losses = model(replace(scene_batch(2, tasks=("caption",)), decoders=["lumen"], possible_tasks=("caption",)))
    sum(term.total for term in losses.values()).backward()
    for part in (trunk.dense, trunk.stem, trunk.regions, trunk.queries):  # used or not in this batch
        assert all(p.grad is not None for p in part.parameters())


def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_split():
    model = tiny_model(grounding_dino={**EXPERTS["grounding_dino"], "denoising_queries": 0, "mask_points": 10**4})
    rows = [scenes.scene_row(0, n, SIDE) for n in range(3)]
    collator = Collator(tiny_tokenizer(), SIDE, UNDERSTANDING, scenes.SKELETONS)
    whole, *parts = (
        model(collator(some, [decode(row["image"]) for row in some], [np.random.default_rng(0) for _ in some]))
        for some in (rows, rows[:1], rows[1:])
    )
    for name in ("gdino_class", "gdino_box"):
        torch.testing.assert_close(whole[name].total, sum(part[name].total for part in parts), rtol=1e-3, atol=1e-3)
        assert whole[name].count == sum(part[name].count for part in parts) > 3


def test_settings_refuse_a_decoder_that_cannot_serve_the_task():
    with pytest.raises(ValidationError, match="'grounding_dino' cannot serve task 'detect'; this model's"):
        tiny_settings(decoders={"detect": "grounding_dino"})
    with pytest.raises(ValidationError, match="'lumen' cannot serve task 'generate'; this model has none for it"):
        tiny_settings(decoders={"generate": "lumen"})


def test_a_model_can_do_without_the_light_decoder():
    engine = Engine(tiny_loaded(lumen=None, **DINO))
    out = engine.trunk.links(PICTURES[:1], [[DETECT]])
    assert out.dense is None and "lumen" not in engine.decoders and engine.trunk.trunk.dense is None
    assert len(engine.run(PICTURES[:1], [[DETECT]], score_threshold=0.0)[0][0].predictions) == 3


@pytest.mark.parametrize("decoder", ["lumen", "grounding_dino"])
def test_a_region_gets_the_mask_of_its_object(decoder):
    engine = Engine(tiny_loaded(decoders={"region_segment": decoder, "semantic": decoder}, **DINO))
    size = PICTURES[0].shape[:2]
    boxes = (np.array([[2, 3], [30, 40]]), np.array([[20, 20], [60, 60]]))
    asked = [make_request("region_segment", region=Region("box", size, box)) for box in boxes]
    semantic = make_request("semantic", classes=["red circle", "blue square"])
    answers = engine.run(PICTURES[:2], [[*asked, semantic], [asked[1]]], score_threshold=0.0)
    for answer in (*answers[0][:2], *answers[1]):
        (prediction,) = answer.predictions
        assert prediction.phrase == "region" and prediction.masks.size == size and answer.route == "[SEG]"
    same(engine.run(PICTURES[:1], [[asked[1]]], score_threshold=0.0)[0][0], answers[0][1])
    first, other = engine.trunk.links(PICTURES[:1], [asked]).decoder_inputs[decoder].link.embeddings
    assert (first - other).abs().max() > 1e-3
    regions = [p.masks.to_arrays() for p in answers[0][2].predictions]
    assert sum(len(masks) for masks in regions) > 0
    assert np.concatenate(regions).sum(0).max() <= 1


POSE = make_request("pose", classes=["red figure", "teapot"], keypoints=["spout", "lid", "handle"])


@pytest.mark.parametrize("pose_queries", [False, True])
def test_poses_of_any_skeleton_come_from_the_expert(pose_queries):
    engine = Engine(tiny_loaded(decoders={"pose": "unipose"}, pose_queries=pose_queries, unipose=EXPERTS["unipose"]))
    known = make_request("pose", classes=["figure"])
    asked = [[POSE, DETECT], [known]]
    answers = engine.run(PICTURES[:2], asked, score_threshold=0.0)
    assert [p.keypoints.names for p in answers[0][0].predictions] == [("spout", "lid", "handle")] * 2
    assert answers[1][0].predictions[0].keypoints.names == FIGURE_KEYPOINTS
    found = max(answers[0][0].predictions, key=len)  # fresh weights may give all slots to one prompt
    assert len(found) > 0 and found.keypoints.xyv.shape == (len(found), 3, 3)
    for picture, requests, together in zip(PICTURES, asked, answers, strict=False):
        for chunk in (2, 64):  # an object and its keypoints may be in different passes
            alone = engine.run([picture], [requests[:1]], score_threshold=0.0, class_chunk=chunk)[0][0]
            same(alone, together[0])
            for one, other in zip(alone.predictions, together[0].predictions, strict=True):
                assert np.allclose(one.keypoints.xyv, other.keypoints.xyv, atol=1e-2)


def test_object_and_keypoint_prompts_have_separate_heads_and_queries():
    model = tiny_model(pose_queries=True, unipose=EXPERTS["unipose"])
    rows = [row for row in (scenes.scene_row(0, n, SIDE) for n in range(12)) if "pose" in row["tasks"]][:2]
    losses = model(scene_batch(rows, ("pose",)))
    names = [name for name in losses if name.startswith("unipose")]
    assert len(names) == 5 and losses["unipose_oks"].count > 0
    sum(losses[name].total for name in names).backward()
    head = model.trunk.link_heads["unipose"]
    for queries in ("perception", "pose"):
        assert model.trunk.queries.queries[queries].grad.abs().sum() > 0
    assert head.objects.mlp[0].weight.grad.abs().sum() > 0 and head.keypoints.mlp[0].weight.grad.abs().sum() > 0
