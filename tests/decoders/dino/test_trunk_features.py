"""Expert detectors that read the trunk's dense features in place of a backbone of their own."""

import pytest
import torch
from support.gdino_tiny import LINK_CHANNELS, random_link, targets_of
from support.tiny_models import EXPERTS, random_images, tiny_loaded, tiny_model

from lumen_ray import config
from lumen_ray.decoders.grounding_dino.decoder import GroundingDinoDecoder
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import Request


def without_backbone(name):
    return {key: value for key, value in EXPERTS[name].items() if key != "backbone"} | {"features": "trunk"}


def test_the_losses_reach_the_dense_features_of_every_image():
    torch.manual_seed(0)
    settings = GroundingDinoSettings.model_validate(without_backbone("grounding_dino"))
    decoder = GroundingDinoDecoder(settings, LINK_CHANNELS, dense_channels=16)
    dense = torch.randn(2, 16, 16, 16).requires_grad_()
    targets = targets_of([[[4, 4, 40, 40]], [[20, 8, 60, 60]], [[2, 2, 30, 60]]], side=64, masks=True)
    losses = decoder.losses(random_link([2, 1]), dense, targets)
    sum(term.total for term in losses.values()).backward()
    assert dense.grad.isfinite().all() and dense.grad.abs().sum((1, 2, 3)).all()
    assert all(p.grad.any() for p in decoder.trunk.backbone.parameters())


def test_boxes_and_poses_of_a_model_whose_experts_read_the_trunk():
    sections = {name: without_backbone(name) for name in ("grounding_dino", "unipose")}
    engine = Engine(tiny_loaded(lumen=None, **sections))
    image = random_images(1)[0].permute(1, 2, 0).numpy()
    requests = [Request("detect", ("red circle",)), Request("pose", ("figure",))]
    answers = engine.run([image], [requests], score_threshold=0.0)[0]
    for answer in answers:
        boxes = answer.predictions[0].boxes.xyxy
        assert len(boxes) and (boxes >= 0).all() and (boxes <= 64).all()


def test_a_trunk_makes_dense_features_for_them_alone():
    assert tiny_model(lumen=None, grounding_dino=without_backbone("grounding_dino")).trunk.dense is not None
    assert tiny_model(lumen=None, grounding_dino=EXPERTS["grounding_dino"]).trunk.dense is None


@pytest.mark.parametrize("given", [{"backbone": {"embed_dim": 16}}, {"input_size": [800, 1333]}])
def test_nothing_else_may_say_what_the_features_are(given):
    with pytest.raises(UserError, match="features 'trunk' leaves no use for"):
        config.validate(GroundingDinoSettings, without_backbone("grounding_dino") | given, "model")
