"""AdamW and its learning-rate schedule, from a stage of a recipe."""

from __future__ import annotations

import math

import torch
from torch import nn

from lumen_ray.model.build import Generalist
from lumen_ray.train.recipe import MODULES, Stage


def parts(model: Generalist) -> dict[str, nn.Module]:
    """The parts a recipe can name under `trainable` and `lr_scale`."""
    return {name: (model.decoders[name] if name in model.decoders else getattr(model.trunk, name)) for name in MODULES}


def set_trainable(model: Generalist, stage: Stage) -> None:
    """Only the stage's parts learn."""
    for name, part in parts(model).items():
        part.requires_grad_(name in stage.trainable)


def build_optimizer(model: Generalist, stage: Stage) -> torch.optim.AdamW:
    """One group per part and kind: vectors (norms, biases, scales, queries' scalars) are not decayed."""
    groups = []
    for name, part in parts(model).items():
        trained = [p for p in part.parameters() if p.requires_grad]
        lr = stage.lr * stage.lr_scale.get(name, 1.0)
        for decay, members in (
            (stage.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if members:
                groups.append({"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)


def lr_factor(stage: Stage, step: int) -> float:
    """Linear warm-up, flat, then cosine to `final_lr` over the rest of the stage."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    start = stage.decay_from * stage.steps
    if step < start:
        return 1.0
    progress = (step - start) / max(1.0, stage.steps - start)
    return stage.final_lr + (1 - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> float:
    """Sets every group's rate for a step of the stage; returns the stage's own."""
    factor = lr_factor(stage, step)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return stage.lr * factor
