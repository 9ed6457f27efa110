"""Memory of the parts of a model, counted on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumen_ray.errors import UserError
from lumen_ray.run_settings import ranks_per_copy

if TYPE_CHECKING:
    from torch import nn

    from lumen_ray.model.build import Generalist
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.recipe import Recipe

FP32, BF16 = 4, 2
#: bytes of AdamW's moments and of the gradient per trainable parameter, in fp32
OPTIMISER, GRADIENT = 8, 4


@dataclass(frozen=True)
class Role:
    """Parameter counts of a part of a model that can be deployed by itself: the trunk or a decoder.

    num_trainable: of all `parameters`, those that training changes.
    gathered, unsharded: under FSDP, the most that are gathered at a time in a step, and those gathered for all of it.
    largest: of the largest tensor; weights pass through the host one tensor at a time on their way to a GPU or a rank.
    """

    name: str
    parameters: int
    num_trainable: int
    gathered: int = 0
    unsharded: int = 0
    largest: int = 0

    def training(self, workers: int) -> int:
        """Bytes per rank of training in fp32 under FSDP, without activations: its share of weights, gradients and
        optimiser state, and the gathered weights."""
        whole = self.parameters * FP32 + self.num_trainable * (GRADIENT + OPTIMISER)
        if workers == 1:
            return whole
        return whole // workers + (self.gathered + self.unsharded) * FP32


def meta_model(settings: ModelSettings) -> Generalist:
    """A model on the meta device, to be counted."""
    import torch

    from lumen_ray.model.build import Generalist

    with torch.device("meta"):
        return Generalist(settings, settings.vocab_size)


def roles_of(model: Generalist) -> list[Role]:
    """The roles of a model: its trunk, then its decoders."""
    trunk = _role("trunk", model.trunk, sharded=("vision", "llm"))
    return [trunk, *(_role(name, decoder) for name, decoder in model.decoders.items())]


def _role(name: str, module: nn.Module, sharded: tuple[str, ...] = ()) -> Role:
    """The counts of a module as `train.parallel.shard` wraps it.

    An expert is gathered as a whole. Of other modules, the large blocks of their `sharded` submodules are gathered one
    by one, each with the next one prefetched, and the rest together.
    """
    from lumen_ray.decoders.base import Learner
    from lumen_ray.model.build import count_parameters
    from lumen_ray.train.blocks import blocks
    from lumen_ray.train.parallel import MIN_BLOCK_PARAMETERS, is_expert

    whole = count_parameters(module)
    num_trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    largest = max(p.numel() for p in module.parameters())
    if isinstance(module, Learner) and is_expert(module):
        return Role(name, whole, num_trainable, gathered=whole, largest=largest)
    counted = [count_parameters(block) for part in sharded for _, block in blocks(getattr(module, part))]
    large = [count for count in counted if count >= MIN_BLOCK_PARAMETERS]
    return Role(name, whole, num_trainable, 2 * max(large, default=0), whole - sum(large), largest)


def combined(roles: list[Role], groups: Iterable[Collection[str]] = ()) -> Role:
    """The counts of all roles in one process.

    groups: names of the decoders trained in one step, since the gathered weights of an expert are kept to its end;
    without them a step trains one expert at most.
    """
    steps = [*([role.name] for role in roles), *groups]
    return Role(
        "in all",
        sum(role.parameters for role in roles),
        sum(role.num_trainable for role in roles),
        max(sum(role.gathered for role in roles if role.name in names) for names in steps),
        sum(role.unsharded for role in roles),
        max(role.largest for role in roles),
    )


@dataclass(frozen=True)
class RecipeFootprint:
    """The counts of a recipe.

    model: the whole model, with LoRA's adapters, in `stage`, the one with most trainable parameters; None if it cannot
    be counted, for the reason in `fault`.
    averaged: values that an EMA is kept of.
    """

    recipe: Recipe
    stage: str = ""
    model: Role | None = None
    averaged: int = 0
    fault: str = ""

    def memory(self, workers: int) -> int:
        """Bytes per rank of training the recipe, without activations."""
        assert self.model is not None
        sharing = ranks_per_copy(workers, self.recipe.shard_group)
        return self.model.training(sharing) + self.averaged * FP32 // sharing


def count_recipe(settings: ModelSettings, recipe: Recipe) -> RecipeFootprint:
    """Counts what a recipe trains of the preset `settings`, stage by stage."""
    import torch

    from lumen_ray.train.lora import changing_state, inject
    from lumen_ray.train.optimizer import set_trainable

    model, stages = meta_model(settings), {}
    try:
        if recipe.lora is not None:
            with torch.device("meta"):
                inject(model, recipe.lora, recipe.seed)
        for stage in recipe.stages:
            set_trainable(model, stage)
            stages[stage.name] = combined(roles_of(model), [group.learning for group in stage.groups])
    except UserError as error:  # `peft` is optional
        return RecipeFootprint(recipe, fault=str(error))
    most = max(stages, key=lambda name: stages[name].num_trainable)
    averaged = sum(v.numel() for v in changing_state(model).values() if v.is_floating_point()) if recipe.ema else 0
    return RecipeFootprint(recipe, most, stages[most], averaged)
