"""What can only be said of a recipe with its model at hand, said before a worker starts."""

from __future__ import annotations

import torch

from lumen_ray.model.build import build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train import lora
from lumen_ray.train.optimizer import lr_factors, set_trainable
from lumen_ray.train.recipe import Recipe, is_pattern
from lumen_ray.train.tracker import check_mlflow


def check_recipe(recipe: Recipe, settings: ModelSettings, vocab_size: int) -> None:
    """`UserError` for names that fit nothing in the model, and for packages that are asked for and missing.

    The model is built without memory for its weights, and only where a recipe names modules.
    """
    check_mlflow(recipe)
    named = [stage for stage in recipe.stages if any(map(is_pattern, stage.lr_scale))]
    if not named and not recipe.lora:
        return
    with torch.device("meta"):
        model = build_model(settings, vocab_size)
        if recipe.lora:
            lora.inject(model, recipe.lora, recipe.seed)
    for stage in named:
        set_trainable(model, stage)
        lr_factors(model, stage)
