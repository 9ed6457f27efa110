"""What the parts of a model take in memory, counted on the model without its numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumen_ray.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from lumen_ray.model.build import Generalist
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.recipe import Recipe

FP32, BF16 = 4, 2
#: bytes of AdamW and the gradient per number that is trained, in fp32
OPTIMISER, GRADIENT = 8, 4


@dataclass(frozen=True)
class Role:
    """A part of a model that can be deployed by itself. `learns`: parameters that training changes; `gathered`: the
    most that are gathered at a time while it computes, `unsharded`: those that are gathered for the whole step;
    `largest`: those of its largest tensor, which weights pass through one by one on their way to a GPU or a rank.
    """

    name: str
    parameters: int
    learns: int
    gathered: int = 0
    unsharded: int = 0
    largest: int = 0

    def training(self, workers: int) -> int:
        """Bytes per rank while all that learns is trained in fp32 under FSDP, activations aside: its share of weights,
        gradients and optimiser, and what is gathered."""
        whole = self.parameters * FP32 + self.learns * (GRADIENT + OPTIMISER)
        if workers == 1:
            return whole
        return whole // workers + (self.gathered + self.unsharded) * FP32


def on_meta(settings: ModelSettings) -> Generalist:
    """The model without its numbers, to be counted."""
    import torch

    from lumen_ray.model.build import Generalist

    with torch.device("meta"):
        return Generalist(settings, settings.vocab_size)


def roles_of(model: Generalist) -> list[Role]:
    """Trunk and decoders of a model."""
    trunk = _role("trunk", model.trunk, sharded=("vision", "llm"))
    return [trunk, *(_role(name, decoder) for name, decoder in model.decoders.items())]


def _role(name: str, module: nn.Module, sharded: tuple[str, ...] = ()) -> Role:
    """A module as `train.parallel.shard` cuts it: an expert is gathered as a whole; of another one large blocks of its
    `sharded` parts apart, with the next one on its way, and the rest together."""
    from lumen_ray.model.build import count_parameters
    from lumen_ray.train.blocks import blocks
    from lumen_ray.train.parallel import MIN_BLOCK_PARAMETERS, is_expert

    whole = count_parameters(module)
    learns = sum(p.numel() for p in module.parameters() if p.requires_grad)
    largest = max(p.numel() for p in module.parameters())
    if not sharded and is_expert(module):
        return Role(name, whole, learns, gathered=whole, largest=largest)
    counted = [count_parameters(block) for part in sharded for _, block in blocks(getattr(module, part))]
    apart = [count for count in counted if count >= MIN_BLOCK_PARAMETERS]
    return Role(name, whole, learns, 2 * max(apart, default=0), whole - sum(apart), largest)


def together(roles: list[Role], groups: Iterable[Collection[str]] = ()) -> Role:
    """All of them in one process. `groups`: the decoders that learn in one step, by name; what an expert gathers is
    held until the step ends. Without them a step trains one expert at most."""
    steps = [*([role.name] for role in roles), *groups]
    return Role(
        "in all",
        sum(role.parameters for role in roles),
        sum(role.learns for role in roles),
        max(sum(role.gathered for role in roles if role.name in names) for names in steps),
        sum(role.unsharded for role in roles),
        max(role.largest for role in roles),
    )


@dataclass(frozen=True)
class ByRecipe:
    """What a recipe trains: the whole model in the stage that keeps most, with LoRA's adapters; `averaged`: numbers of
    which it keeps an average. `fault`: why that cannot be counted."""

    recipe: Recipe
    stage: str = ""
    model: Role | None = None
    averaged: int = 0
    fault: str = ""

    def memory(self, workers: int) -> int:
        """Bytes per rank."""
        return self.model.training(workers) + self.averaged * FP32 // workers


def count_recipe(settings: ModelSettings, recipe: Recipe) -> ByRecipe:
    import torch

    from lumen_ray.train.lora import changing_state, inject
    from lumen_ray.train.optimizer import set_trainable

    model, stages = on_meta(settings), {}
    try:
        if recipe.lora is not None:
            with torch.device("meta"):
                inject(model, recipe.lora, recipe.seed)
        for stage in recipe.stages:
            set_trainable(model, stage)
            stages[stage.name] = together(roles_of(model), [group.learning for group in stage.groups])
    except UserError as error:  # `peft` is optional
        return ByRecipe(recipe, fault=str(error))
    most = max(stages, key=lambda name: stages[name].learns)
    averaged = sum(v.numel() for v in changing_state(model).values() if v.is_floating_point()) if recipe.ema else 0
    return ByRecipe(recipe, most, stages[most], averaged)
