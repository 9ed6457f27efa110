"""Model settings: what cannot be built is refused with one sentence that names the key."""

import pytest
import yaml
from support.tiny_models import CLIP, DINOV2, EXPERTS, llm, tiny_settings

from lumen_ray import config
from lumen_ray.errors import UserError
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path


def refused(**changes):
    data = tiny_settings().model_dump() | changes
    with pytest.raises(UserError) as caught:
        config.validate(ModelSettings, data, "tiny.yaml")
    assert caught.value.reason == "invalid_config" and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"imge_size": 64}, "tiny.yaml: unknown key 'imge_size'; did you mean 'image_size'?"),
        ({"image_size": 66}, "image_size 66 must be a multiple of lumen.stride 8"),
        ({"image_size": 72}, "image_size 72 must be a multiple of vision.clip.patch_size 16"),
        ({"lumen": {"stride": 5}}, "'lumen.stride' is invalid"),
        ({"lumen": {"strid": 8}}, "unknown key 'lumen.strid'; did you mean 'stride'?"),
        ({"vision": {}}, "tiny.yaml: vision: at least one of 'clip' and 'dinov2' must be set"),
        ({"vision": {"clip": CLIP | {"hiden_size": 8}}}, "'vision.clip.hiden_size'; did you mean 'hidden_size'?"),
        (
            {"vision": {"clip": CLIP, "dinov2": DINOV2 | {"patch_size": 8}}},
            "one patch_size to share a grid, got [8, 16]",
        ),
        ({"vision": {"clip": CLIP, "token_merge": 3}}, "token_merge 3 must divide the 4 patches per side"),
        ({"llm": {"hidden_size": 32}}, "llm: 'model_type' is required"),
        ({"llm": llm() | {"model_type": "lama"}}, "unknown llm.model_type 'lama'; did you mean 'llama'?"),
        ({"llm": llm() | {"num_layers": 3}}, "unknown key 'llm.num_layers'"),
    ],
)
def test_refusals_name_the_key(changes, says):
    assert says in refused(**changes)


def test_the_preset_is_valid_and_survives_a_round_trip():
    settings = config.load(ModelSettings, model_path("nano"))
    assert settings.name == "nano"
    again = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))
    assert config.validate(ModelSettings, again, "copy") == settings


def test_choosing_decoders_keeps_the_others():
    both = {"grounding_dino": EXPERTS["grounding_dino"]}
    own = tiny_settings(decoders={"segment": "grounding_dino"}, **both)
    chosen = own.choose({"detect": "grounding_dino", "count": "lumen"}, "here")
    assert chosen.decoders == {"segment": "grounding_dino", "detect": "grounding_dino", "count": "lumen"}
    assert chosen.serving == own.serving | {"detect": "grounding_dino"}
    assert chosen.chosen_over(own) == {"detect": "grounding_dino"}  # lumen counts without being told to
    assert own.choose({"segment": "lumen"}, "here").chosen_over(own) == {"segment": "lumen"}
    assert own.choose({}, "here") == own
