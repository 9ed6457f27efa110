"""Stages that keep a frozen trunk's outputs."""

import pytest
import torch
from support.tiny_models import tiny_settings
from support.train_fakes import cut_after, job_of, log_of, weights_of

from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.train.checks import check_recipe
from lumen_ray.train.launch import train_local

STAGE = {"steps": 6, "trainable": ["link_heads", "lumen"], "groups": [{"tasks": ["detect", "refer"]}]}


def test_a_run_ends_as_without_it_and_can_be_resumed(data, tmp_path):
    runs = {}
    for name, size in (("plain", 0), ("cached", 64)):
        runs[name] = tmp_path / name
        train_local(job_of(data, runs[name], STAGE | {"cache_trunk": size}, checkpoint_every=3))
    wanted, found = weights_of(runs["plain"]), weights_of(runs["cached"])
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)
    assert "loss/lm" not in log_of(runs["cached"])[-1] and "loss/lm" in log_of(runs["plain"])[-1]
    cut_after(runs["cached"], 3)
    train_local(job_of(data, runs["cached"], STAGE | {"cache_trunk": 64}, checkpoint_every=3))
    again = weights_of(runs["cached"])
    assert all(torch.allclose(again[name], found[name], atol=1e-4) for name in wanted)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"trainable": None}, "it trains stem, vision, regions, llm, queries, dense; list only"),
        ({"trainable": ["dense", "lumen"]}, "it trains dense; list only"),
        ({"augment": {"flip_x": True}}, "augmentation changes the images"),
        ({"branches": {"exemplars": 0.5}}, "classes are shown by other images"),
        ({"groups": [{"tasks": ["detect", "caption"]}]}, "cannot keep prompts of task 'caption'"),
    ],
)
def test_stages_that_cannot_keep_them_are_refused(changes, why):
    stage = {"name": "s0", "cache_trunk": 64, **STAGE, **changes}
    recipe = Recipe.model_validate({"name": "x", "model": "x", "stages": [stage]})
    with pytest.raises(UserError, match=f"stage 's0' has cache_trunk, .*{why}"):
        check_recipe(recipe, tiny_settings(), 300)


def test_a_part_of_rate_zero_is_frozen():
    stage = {"name": "s0", "cache_trunk": 64, **STAGE, "trainable": ["dense", "lumen"], "lr_scale": {"dense": 0}}
    check_recipe(Recipe.model_validate({"name": "x", "model": "x", "stages": [stage]}), tiny_settings(), 300)
