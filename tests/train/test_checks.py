import pytest
from support.tiny_models import tiny_settings
from support.train_fakes import job_of

from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.train.checks import check_recipe


def test_names_are_checked_before_a_worker_starts(data, tmp_path):
    with pytest.raises(UserError, match="stage 's0': lr_scale 'trunk.nothing' fits nothing"):
        job_of(data, tmp_path / "run", {"steps": 1, "lr_scale": {"trunk.nothing": 0.1}})


def test_the_sequential_layout_takes_no_classes_by_example():
    recipe = Recipe.model_validate(
        {"name": "x", "model": "x", "stages": [{"name": "s0", "steps": 1, "groups": [{"tasks": ["detect"]}],
                                   "branches": {"exemplars": 0.1}}]}
    )  # fmt: skip
    check_recipe(recipe, tiny_settings(), 300)
    with pytest.raises(UserError, match="stage 's0': models with prompt_layout 'sequential' cannot take classes by"):
        check_recipe(
            recipe,
            tiny_settings(prompt_layout="sequential", prefix_attention="causal", link_reads_words=False),
            300,
        )
