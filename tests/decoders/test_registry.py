"""The registry of decoders: built-in specs fit their classes, and what other packages register is checked."""

import pytest
import torch
from support.tiny_models import EXPERTS, tiny_model

from lumen_ray.checkpoints.loader import PublishedLoader
from lumen_ray.checkpoints.rules import ReleasedModule
from lumen_ray.decoders.base import Decoder, ImageDecoder
from lumen_ray.decoders.registry import DECODERS, LOSSES, decoder_class, decoders_for
from lumen_ray.decoders.spec import RESERVED, TRUNK_PARTS, DecoderSettings
from lumen_ray.errors import UserError
from lumen_ray.model.settings import ModelSettings
from lumen_ray.trunk.settings import TrunkSettings


@pytest.mark.parametrize("name", DECODERS)
def test_a_spec_names_what_can_be_imported(name):
    spec = DECODERS[name]
    cls = decoder_class(name)
    assert issubclass(cls, Decoder | ImageDecoder) and cls.spec == spec and spec.class_name == cls.__name__
    assert callable(spec.resolve("link_head")) and callable(spec.resolve("flops"))
    assert spec.published is None or isinstance(spec.resolve("published"), PublishedLoader)
    assert spec.released is None or isinstance(spec.resolve("released"), ReleasedModule)
    assert name in ModelSettings.model_fields


def test_a_model_has_the_losses_that_the_specs_name():
    assert tiny_model(**EXPERTS).loss_names == LOSSES


def test_losses_have_names_of_their_own():
    assert len(set(LOSSES)) == len(LOSSES) == 1 + sum(len(spec.losses) for spec in DECODERS.values())


def test_settings_of_a_model_and_parts_of_the_trunk_are_no_names_of_decoders():
    names = {name for name in (*dir(ModelSettings), *dir(torch.nn.ModuleDict())) if not name.startswith("_")}
    inherited = {name for name in names if hasattr(DecoderSettings, name) or name.startswith("model_")}
    inherited.add("smart_apply")  # which transformers gives to modules
    assert set(TRUNK_PARTS) | set(TrunkSettings.model_fields) <= RESERVED and names - inherited <= RESERVED
    assert set(ModelSettings.model_fields) - RESERVED == set(DECODERS)


def test_the_first_decoder_of_a_task_is_the_light_one():
    assert decoders_for("detect") == ("lumen", "grounding_dino") and decoders_for("pose") == ("lumen", "unipose")
    assert decoders_for("caption") == ()


def test_an_unknown_decoder_names_the_nearest():
    with pytest.raises(UserError, match="unknown decoder 'unipos'; did you mean 'unipose'"):
        decoder_class("unipos")
