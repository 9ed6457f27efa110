"""AdamW for a stage of a recipe: learning rates by part, name and depth, and their schedule."""

from __future__ import annotations

import fnmatch
import math

import torch
from torch import nn

from lumen_ray.decoders.registry import PARTS
from lumen_ray.errors import UserError, suggest
from lumen_ray.model.build import Generalist
from lumen_ray.recipe import Stage, is_pattern
from lumen_ray.train.blocks import blocks, find_part
from lumen_ray.train.lora import frozen_names
from lumen_ray.train.new_tokens import only_new_rows, vocabulary


def parts(model: Generalist) -> dict[str, nn.Module]:
    """The model's modules that a recipe can name under `trainable` and `lr_scale`."""
    return {name: module for name in PARTS if (module := find_part(model, name)) is not None}


def set_trainable(model: Generalist, stage: Stage) -> None:
    """Sets `requires_grad` on the parts that the stage trains, except parameters with rate 0 or frozen beside adapters.

    The vocabulary of a published LLM is trained with the queries even where the LLM is frozen: `only_new_rows`.
    """
    for name, module in parts(model).items():
        module.requires_grad_(_is_trained(name, stage))
    if _is_trained("queries", stage):
        for p in vocabulary(model):
            p.requires_grad_(True)
    frozen = {pattern for pattern, factor in stage.lr_scale.items() if is_pattern(pattern) and factor == 0}
    names = {name: p for name, p in model.named_parameters() if p.requires_grad} if frozen else {}
    for name in {name for pattern in frozen for name in _fitting(pattern, names, stage)} | frozen_names(model):
        model.get_parameter(name).requires_grad_(False)


def _is_trained(part: str, stage: Stage) -> bool:
    return (stage.trainable is None or part in stage.trainable) and stage.lr_scale.get(part) != 0


def build_optimizer(model: Generalist, stage: Stage) -> torch.optim.AdamW:
    """One group per part, weight decay and learning rate: vectors (norms, biases, scales) and weights of which only the
    rows of new tokens learn are not decayed."""
    factors = lr_factors(model, stage)
    kept = {id(p) for p in only_new_rows(model)}
    groups = []
    for module in parts(model).values():
        trained = [p for p in module.parameters() if p.requires_grad]
        for decay, kind in (
            (stage.weight_decay, [p for p in trained if p.ndim > 1 and id(p) not in kept]),
            (0.0, [p for p in trained if p.ndim <= 1 or id(p) in kept]),
        ):
            by_factor: dict[float, list[nn.Parameter]] = {}
            for p in kind:
                by_factor.setdefault(factors[p], []).append(p)
            for factor, members in by_factor.items():
                lr = stage.lr * factor
                groups.append({"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)


def lr_factors(model: Generalist, stage: Stage) -> dict[nn.Parameter, float]:
    """The factor on the stage's learning rate by trained parameter. Raises `UserError` if a pattern fits none."""
    factors: dict[nn.Parameter, float] = {}
    for name, module in parts(model).items():
        depth = depths(module) if name in stage.layer_decay else {}
        for path, p in module.named_parameters():
            if p.requires_grad:
                factors[p] = stage.lr_scale.get(name, 1.0) * stage.layer_decay.get(name, 1.0) ** depth.get(path, 0)
    if not _is_trained("llm", stage):
        for p in only_new_rows(model):
            factors[p] = stage.lr_scale.get("queries", 1.0)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern, factor in stage.lr_scale.items():
        if is_pattern(pattern) and factor:
            for name in _fitting(pattern, names, stage):
                factors[names[name]] *= factor
    return factors


def _fitting(pattern: str, names: dict[str, nn.Parameter], stage: Stage) -> list[str]:
    """Names of parameters that match the pattern, themselves or by a module they are in."""
    matches = [
        name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    ]
    if not matches:
        modules = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
        raise UserError(
            f"stage '{stage.name}': lr_scale '{pattern}' fits nothing that the stage trains;"
            f"{suggest(pattern, modules)} give a part, a module such as trunk.vision.clip, or a pattern such as *norm*",
            "no_match",
        )
    return matches


def depths(module: nn.Module) -> dict[str, int]:
    """Depth of each parameter below the output of its transformer, in layers, its layer included; absent where that has
    no meaning.

    Modules registered before the blocks feed them (embeddings), modules after read them (the last norm).
    """
    lists: dict[str, list[str]] = {}
    for name, _ in blocks(module):
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    depth: dict[str, int] = {}
    for path, members in lists.items():
        root = f"{path.rpartition('model.')[0]}model."
        below, index = True, {name: i for i, name in enumerate(members)}
        for name, _ in module.named_parameters():
            if name.startswith(f"{path}."):
                below = False
                block = name[: name.index(".", len(path) + 1)]
                depth[name] = len(members) - index[block]
            elif below and name.startswith(root):
                depth[name] = len(members) + 1
    return depth


def lr_factor(stage: Stage, step: int) -> float:
    """Linear warm-up, constant until `decay_from`, then cosine to `final_lr` at the end of the stage."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    start = stage.decay_from * stage.steps
    if step < start:
        return 1.0
    progress = (step - start) / max(1.0, stage.steps - start)
    return stage.final_lr + (1 - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> float:
    """Sets the learning rate of every group for a step of the stage; returns that of parameters with factor 1."""
    factor = lr_factor(stage, step)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return stage.lr * factor
