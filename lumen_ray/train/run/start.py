"""The start point of a run: the model it trains, with another model's weights or fresh ones, and its tokenizer."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lumen_ray import config
from lumen_ray.data import urls
from lumen_ray.data.output_folder import OutputFolder
from lumen_ray.errors import UserError
from lumen_ray.meta_init import on_meta
from lumen_ray.model.build import Generalist, ModelMeta, build_model, read_meta
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.warm_start import StartWeights, start_settings, taught_heads
from lumen_ray.presets import model_folder, model_path
from lumen_ray.recipe import Recipe
from lumen_ray.train import parallel
from lumen_ray.train.run import checkpoint
from lumen_ray.train.run.folder import keep_record, keep_tokenizer, start_record
from lumen_ray.trunk.tokenizer import LumenTokenizer


@dataclass(frozen=True)
class StartPoint:
    """The state of a run before its first step; plain values, so that Ray can ship it.

    A resumed run has the same start point: its checkpoints replace the weights, or with adapters only those that
    training changes.
    """

    settings: ModelSettings
    tokenizer: LumenTokenizer
    seed: int  # of fresh weights
    init_from: str | None = None  # absolute path or URL of the model folder whose weights the run starts from
    meta: ModelMeta | None = None  # of the model in `init_from`

    def build_model(self) -> Generalist:
        """The model on the meta device."""
        with on_meta():
            return build_model(self.settings, len(self.tokenizer), self.seed)

    def weights(self, model: Generalist) -> Mapping[str, Tensor]:
        """Tensors by their names in `model`, without adapters: those of `init_from`, and fresh ones, on the first rank
        only, for the rest."""
        stored: Mapping[str, Tensor] = StartWeights(model, self.init_from) if self.init_from else {}
        fresh: dict[str, Tensor] = {}
        if parallel.rank() == 0 and (missing := model.state_dict().keys() - stored.keys()):
            state = build_model(self.settings, len(self.tokenizer), self.seed).state_dict()
            fresh = {name: state[name] for name in missing}
            fresh |= {name: stored[other] for name, other in taught_heads(fresh, stored).items()}
        return ChainMap(fresh, stored)  # type: ignore[arg-type]  # nothing writes to the second


def resolve_model(recipe: Recipe, init_from: str | None) -> tuple[Recipe, ModelSettings]:
    """The recipe with an absolute `init_from`, and the settings of the model it trains.

    `init_from` replaces that of the recipe. Raises `UserError` where a preset of published weights has none, or where
    the two models do not fit.
    """
    folder = init_from or recipe.init_from
    if folder:
        local = model_folder(folder).absolute()  # raises for one that is not there
        folder = folder if urls.is_url(folder) else str(local)
    recipe = recipe.model_copy(update={"init_from": folder})
    settings = config.load(ModelSettings, model_path(recipe.model))
    if recipe.init_from:
        return recipe, start_settings(settings, recipe.init_from)
    if settings.published_weights:
        raise UserError(
            f"preset '{settings.name}' needs published weights to start from; give the model folder that "
            f"'{settings.conversion}' makes with --init-from, or as 'init_from' in the recipe",
            "no_start",
        )
    return recipe, settings


def make_start(
    run: OutputFolder, shards: str | Path, recipe: Recipe, settings: ModelSettings, manifest: dict[str, Any]
) -> StartPoint:
    """Makes the start point of a run and records it in the run's files, whose folder the caller must hold
    (`sole_starter`, `sole_writer`).

    `recipe` and `settings` as of `resolve_model`. Raises `UserError` if the folder holds a run with another start.
    """
    newest, init_from = checkpoint.latest(run.location), recipe.init_from
    if newest:
        checkpoint.check_preset(newest, settings.name)
    keep_record(run.folder, start_record(recipe, settings, manifest, init_from), resumes=newest is not None)
    tokenizer = keep_tokenizer(run.folder, shards, settings, init_from, resumes=newest is not None)
    meta = read_meta(init_from) if init_from else None
    return StartPoint(settings, tokenizer, recipe.seed, init_from, meta)
