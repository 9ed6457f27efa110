"""Checks of a recipe against the model it trains, made before a worker starts."""

from __future__ import annotations

import torch

from lumen_ray.decoders.registry import DECODERS, PARTS, check_usable, decoders_for
from lumen_ray.decoders.spec import TRUNK_PARTS
from lumen_ray.errors import UserError
from lumen_ray.model.build import build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.recipe import AugmentSettings, Recipe, Stage, TaskGroup, is_pattern
from lumen_ray.tasks import TASKS
from lumen_ray.train import lora
from lumen_ray.train.metrics.mlflow import check_mlflow
from lumen_ray.train.metrics.wandb import check_wandb
from lumen_ray.train.optimizer import lr_factors, set_trainable


def check_recipe(recipe: Recipe, settings: ModelSettings, vocab_size: int) -> None:
    """Raises `UserError` for tasks that no decoder of the model learns, for patterns that match nothing in the model,
    and for packages that the recipe needs and that are not installed.

    The model is built only if the recipe names modules, on the meta device.
    """
    check_mlflow(recipe)
    check_wandb(recipe)
    if settings.image_adapters and not settings.published_tokens:
        raise UserError(
            f"model '{settings.name}' has image_adapters but no published LLM, which would stay random; start from a "
            "folder of 'lumen-ray convert pretrained', or leave image_adapters out",
            "invalid_config",
        )
    for name in settings.decoder_names:
        check_usable(name)
    for stage in recipe.stages:
        if stage.cache_trunk:
            _check_cacheable(stage, recipe, settings)
        if stage.branches.exemplars and settings.prompt_layout == "sequential":
            raise UserError(
                f"stage '{stage.name}': models with prompt_layout 'sequential' cannot take classes by example; set "
                "exemplars to 0",
                "invalid_config",
            )
        for group in stage.groups:
            _check_decoders(stage, group, settings)
            if stage.cache_trunk:
                _check_cached(stage, group)
            adapted = recipe.lora or settings.image_adapters
            if group.distil and not adapted and (stage.trainable is None or "llm" in stage.trainable):
                raise UserError(
                    f"stage '{stage.name}': distil needs an LLM that is frozen or trained by adapters; add lora, or "
                    "leave distil out",
                    "invalid_config",
                )
    with_patterns = [stage for stage in recipe.stages if any(map(is_pattern, stage.lr_scale))]
    if not with_patterns and not recipe.lora:
        return
    with torch.device("meta"):
        model = build_model(settings, vocab_size)
        if recipe.lora:
            lora.inject(model, recipe.lora, recipe.seed)
    for stage in with_patterns:
        set_trainable(model, stage)
        lr_factors(model, stage)


def _check_cacheable(stage: Stage, recipe: Recipe, settings: ModelSettings) -> None:
    """Raises `UserError` unless the trunk's outputs for a prompt are the same whenever the stage asks for it."""
    rates = {name: stage.lr_scale.get(name, 1.0) for name in TRUNK_PARTS if name != "link_heads"}
    trained = [n for n, rate in rates.items() if rate and (stage.trainable is None or n in stage.trainable)]
    if trained:
        why = f"it trains {', '.join(trained)}; list only link_heads and decoders under 'trainable'"
    elif stage.augment != AugmentSettings():
        why = "augmentation changes the images in every step; leave augment out"
    elif recipe.pack_tokens:
        why = "prompts are packed; set pack_tokens to 0"
    elif settings.prompt_layout == "sequential":
        why = "prompts see each other in prompt_layout 'sequential'; train such models without it"
    elif stage.branches.exemplars:
        why = "classes are shown by other images; set exemplars to 0"
    else:
        return
    raise UserError(f"stage '{stage.name}' has cache_trunk, but {why}", "invalid_config")


def _check_cached(stage: Stage, group: TaskGroup) -> None:
    """Raises `UserError` for tasks that learn nothing from a frozen trunk, or whose prompts have regions."""
    if wrong := [name for name in group.tasks if TASKS[name].may_have_regions]:
        raise UserError(
            f"stage '{stage.name}' has cache_trunk, which cannot keep prompts of task '{wrong[0]}'; leave the task out "
            "of this stage",
            "invalid_config",
        )


def _check_decoders(stage: Stage, group: TaskGroup, settings: ModelSettings) -> None:
    have = settings.decoder_names
    for name in group.decoders:
        if name not in have:
            raise UserError(
                f"stage '{stage.name}': model '{settings.name}' has no decoder '{name}'; it has {', '.join(have)}",
                "no_decoder",
            )
    learning = group.decoders or have
    for name in group.tasks:
        task = TASKS[name]
        if not task.is_text and not set(decoders_for(task.name)) & set(learning):
            raise UserError(
                f"stage '{stage.name}': no decoder of model '{settings.name}' learns task '{name}'; it needs one of "
                f"{', '.join(decoders_for(task.name))}, and the group has {', '.join(learning) or 'none'}",
                "no_decoder",
            )
    trained = [*(name for name in PARTS if name not in DECODERS), *group.learning]
    if stage.trainable is not None and not set(stage.trainable) & set(trained):
        raise UserError(
            f"stage '{stage.name}': nothing under 'trainable' learns from the group {', '.join(group.tasks)}; leave "
            f"it out, or train one of {', '.join(trained)}",
            "no_decoder",
        )
