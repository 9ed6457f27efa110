"""Sharded checkpoints through `torch.distributed.checkpoint`, published by an atomic rename.

`RUN/checkpoints/<global step>-<stage>/` holds one DCP shard per rank and `position.json`. A folder with that name is
complete: it was written under another name (ending in `.partial`), flushed to the disk, and renamed. To remove one, it
is renamed back first. So a kill at any moment leaves the previous checkpoint, and none that only looks complete.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lumen_ray.checkpoints.safetensors_file import sync
from lumen_ray.errors import UserError
from lumen_ray.train import parallel
from lumen_ray.train.lora import changing_state, frozen_names

PARTIAL = ".partial"
POSITION = "position.json"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises the error of the first rank that failed in place of torch's summary, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def save(
    run: Path,
    position: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int = 0,
    average: dict[str, Tensor] | None = None,
) -> Path:
    """Writes and publishes a checkpoint, then removes old ones (see `prune`); a collective.

    `position` needs `step` (the next global step) and `stage`; `average`: the moving average of the weights, if there
    is one. An error on one rank is raised on all.
    """
    final = run / "checkpoints" / f"{position['step']:07d}-{position['stage']}"
    # a random name: a rank of an earlier try that is still alive must not write into this folder
    partial = _aside(final, parallel.from_first_rank(uuid.uuid4().hex[:8]))
    partial.mkdir(parents=True, exist_ok=True)
    state = {"model": changing_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if average is not None:
        state["average"] = average
    with _plain_errors():
        dcp.save(state, checkpoint_id=partial, no_dist=parallel.world_size() == 1)
    failure = None
    if parallel.rank() == 0:
        try:
            _publish(partial, final, position)
            prune(run, keep)
        except Exception as error:  # raised below, after the other ranks have got it
            failure = error
    shared = parallel.from_first_rank(failure)
    if shared is not None:
        raise failure or shared
    return final


def _aside(final: Path, token: str) -> Path:
    """The name of a checkpoint's folder while it is incomplete or about to be removed."""
    return final.with_name(f"{final.name}.{token}{PARTIAL}")


def _publish(partial: Path, final: Path, position: dict[str, Any]) -> None:
    with open(partial / POSITION, "w") as file:
        json.dump(position, file)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # incomplete, else the run would have resumed from it
        final.rename(_aside(final, uuid.uuid4().hex[:8]))
    sync(partial)
    os.replace(partial, final)
    sync(final.parent)


def complete(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (p for p in Path(run).glob("checkpoints/*") if p.suffix != PARTIAL)
    return sorted(p for p in folders if (p / POSITION).is_file() and (p / ".metadata").is_file())


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the newest of each stage; 0 keeps all."""
    checkpoints = complete(run)
    newest = {position(path)["stage"]: path for path in checkpoints}
    for path in checkpoints[:-keep] if keep else []:
        if path not in newest.values():
            path.rename(_aside(path, uuid.uuid4().hex[:8]))
    clean(run)


def clean(run: Path) -> None:
    """Removes incomplete checkpoints of killed tries. Only for the process that holds the run folder."""
    for path in Path(run).glob(f"checkpoints/*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)  # a folder that stays does no harm


def latest(run: str | Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max(complete(run), default=None)


def latest_of_ranks(run: str | Path) -> Path | None:
    """`latest` of the first rank, on all ranks; a collective. Shared storage may list older files on other ranks."""
    newest = latest(run) if parallel.rank() == 0 else None
    name = parallel.from_first_rank(newest and newest.name)
    return Path(run) / "checkpoints" / name if name else None


def position(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / POSITION).read_text())


def start_step(checkpoint: Path | None) -> int:
    """The first global step of a run that resumes from the checkpoint."""
    return position(checkpoint)["step"] if checkpoint else 0


def check_preset(checkpoint: Path, preset: str) -> None:
    """Raises `UserError` if the checkpoint is of another preset."""
    saved = position(checkpoint)["preset"]
    if saved != preset:
        raise UserError(
            f"'{checkpoint}' holds a checkpoint of preset '{saved}', not '{preset}'; use another output folder or "
            f"train preset '{saved}'",
            "wrong_preset",
        )


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint into a model, sharded over any number of ranks; a collective."""
    state = {"model": changing_state(model)}
    with _plain_errors():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=parallel.world_size() == 1)
    model.load_state_dict(state["model"], strict=not frozen_names(model))


def load_average(checkpoint: Path, average: dict[str, Tensor]) -> None:
    """Loads the moving average of the weights, in place; a collective."""
    with _plain_errors():
        dcp.load({"average": average}, checkpoint_id=checkpoint, no_dist=parallel.world_size() == 1)


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state; only valid for a checkpoint inside the stage that the optimizer was built for.

    A parameter without gradients so far has no state in the checkpoint, and gets none.
    """
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    with _plain_errors():
        dcp.load(state, checkpoint_id=checkpoint, planner=planner, no_dist=parallel.world_size() == 1)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        if f"optimizer.state.{name}.step" not in saved:
            optimizer.state.pop(parameter, None)
