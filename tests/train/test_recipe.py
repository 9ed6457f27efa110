"""Mistakes in a recipe are told with what is valid."""

import pytest
from tiny_models import tiny_model

from lumen_ray import config
from lumen_ray.errors import UserError
from lumen_ray.train.recipe import LOSSES, Recipe


def recipe(*stages, **changes):
    stages = stages or ({},)
    named = [{"name": f"s{i}", "steps": 3 + i} | stage for i, stage in enumerate(stages)]
    return config.validate(Recipe, {"name": "r", "stages": named} | changes, "r.yaml")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"loss_weights": {"heatmaps": 1}}, "unknown loss 'heatmaps'; did you mean 'heatmap'.*losses: box, heatmap"),
        ({"trainable": ["lumens"]}, "unknown part 'lumens'; did you mean 'lumen'"),
        ({"lr_scale": {"visoin": 1}}, "did you mean 'vision'"),
        ({"trainable": []}, "stage 's0' trains nothing"),
        ({"groups": []}, "needs at least one task group"),
        ({"groups": [{"tasks": []}]}, "needs at least one task"),
        ({"groups": [{"tasks": ["detekt"]}]}, "detect"),
        ({"augment": {"scale": [0, 1]}}, "0 < smallest <= largest"),
        ({"lerning_rate": 1}, "unknown key"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_mistake_in_a_stage_is_told(stage, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(stage)
    assert "\n" not in str(error.value)


def test_stages_are_needed_and_have_their_own_names():
    with pytest.raises(UserError, match="at least one stage"):
        recipe(stages=[])
    with pytest.raises(UserError, match="different names, got x, x"):
        recipe({"name": "x"}, {"name": "x"})


def test_the_losses_that_can_be_weighed_are_those_of_the_model():
    assert tiny_model().loss_names == LOSSES


def test_steps_belong_to_stages():
    made = recipe({}, {})
    assert made.total_steps == 7
    assert [made.at(t) for t in (0, 2, 3, 6, 7)] == [(0, 0), (0, 2), (1, 0), (1, 3), (2, 0)]
