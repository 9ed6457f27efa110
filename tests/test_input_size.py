"""Sizes of what decoders that look at images themselves get."""

import numpy as np
import pytest
from pydantic import ValidationError
from support.tiny_models import EXPERTS, tiny_settings

from lumen_ray import config
from lumen_ray.errors import UserError
from lumen_ray.input_size import PictureSize, ShortSide
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.targets import Frame

DETR = ShortSide(800, 1333)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((500, 500), (800, 800)), ((300, 1000), (400, 1333))],
)
def test_the_shorter_side_fills_its_pixels_unless_the_longer_would_be_too_long(shape, size):
    found, (x, y) = DETR.fit(shape)
    assert found == size and x == y
    frame = Frame(shape, x, found)
    assert frame.extent == found and np.abs(np.array(shape) * x - found).max() < 1


def test_it_is_that_of_the_published_image_processor():
    functional = pytest.importorskip("transformers.image_transforms")
    for shape in ((480, 640), (427, 640), (333, 1000), (1200, 200), (37, 41)):
        theirs = functional.get_size_with_aspect_ratio(shape, 800, 1333)
        assert np.abs(np.subtract(DETR.fit(shape)[0], theirs)).max() <= 1  # they round down, or to the nearest


def test_an_image_that_is_zoomed_out_stays_smaller():
    assert DETR.fit((240, 320), room=2.0) == ((400, 534), (800 / 480, 800 / 480))


def test_a_picture_keeps_its_shape_and_the_number_of_its_pixels():
    rule = PictureSize(64, 96, 8)
    assert rule.fit((300, 300)) == ((64, 64), (64 / 300, 64 / 300))
    assert rule.fit((100, 200)) == ((48, 88), (88 / 200, 48 / 100))
    assert rule.fit((10, 1000))[0] == (8, 96)
    assert rule.fit((80, 200))[0] == (40, 96)  # of a long one both sides shrink, so that nothing looks squashed
    assert PictureSize(64, 96, 8, asked=(16, 80)).fit((300, 300))[0] == (16, 80)


def test_a_size_that_cannot_be_drawn_is_reported():
    rule = PictureSize(64, 96, 8)
    rule.check((96, 8))
    for size, says in (((64, 60), "60x64 cannot be drawn"), ((0, 64), "cannot be drawn"), ((8, 104), "at most 96")):
        with pytest.raises(UserError, match=says) as caught:
            rule.check(size)
        assert caught.value.reason == "invalid_sampling"


def test_settings_say_the_rule():
    dino = {**EXPERTS["grounding_dino"], "input_size": [96, 160]}
    settings = tiny_settings(**EXPERTS | {"grounding_dino": dino})
    picture = PictureSize(16, 64, 8)
    expected = {"grounding_dino": ShortSide(96, 160), "stable_diffusion": picture, "instruct_pix2pix": picture}
    assert settings.input_rules == expected
    for wrong in ([160, 96], [0, 96]):
        with pytest.raises(ValidationError, match="0 < short <= long"):
            tiny_settings(grounding_dino=dino | {"input_size": wrong})


@pytest.mark.parametrize("preset", ["7b", "visionllm-v2"])
def test_presets_of_published_weights_use_the_published_sizes(preset):
    sizes = config.load(ModelSettings, model_path(preset)).input_rules
    assert sizes["grounding_dino"] == sizes["unipose"] == DETR
    assert sizes["stable_diffusion"] == PictureSize(512, 1024, 64)
    assert sizes["instruct_pix2pix"].side == {"7b": 512, "visionllm-v2": 256}[preset]
