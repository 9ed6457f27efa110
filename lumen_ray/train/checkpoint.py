"""Sharded checkpoints through `torch.distributed.checkpoint`, published by an atomic rename.

`RUN/checkpoints/<global step>-<stage>/` holds one DCP shard per rank and `position.json`. A folder without the
`.partial` ending is complete: a kill during a save leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lumen_ray.errors import UserError
from lumen_ray.train import parallel


def save(run: Path, position: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Writes and publishes a checkpoint; a collective. `position` needs `step` (the next global step) and `stage`."""
    final = run / "checkpoints" / f"{position['step']:07d}-{position['stage']}"
    partial = final.with_name(final.name + ".partial")
    if parallel.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=partial, no_dist=parallel.world_size() == 1)
    if parallel.rank() == 0:
        (partial / "position.json").write_text(json.dumps(position))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    parallel.barrier()
    return final


def latest(run: str | Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p for p in Path(run).glob("checkpoints/*") if p.suffix != ".partial" and (p / "position.json").is_file()]
    return max(found, key=lambda p: p.name, default=None)


def position(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "position.json").read_text())


def check_preset(checkpoint: Path, preset: str) -> None:
    """`UserError` when the checkpoint is of another preset."""
    found = position(checkpoint)["preset"]
    if found != preset:
        raise UserError(
            f"'{checkpoint}' holds a checkpoint of preset '{found}', not '{preset}'; use another output folder or "
            f"train preset '{found}'",
            "wrong_preset",
        )


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """The weights of a checkpoint into a model, sharded over any number of ranks; a collective."""
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=parallel.world_size() == 1)
    model.load_state_dict(state["model"])


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state; only valid for a checkpoint inside the stage that the optimizer was built for."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    # partial: a parameter that never had a gradient (DINOv2's mask token) has no state in the checkpoint
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=checkpoint, planner=planner, no_dist=parallel.world_size() == 1)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
