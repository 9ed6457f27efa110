"""Sharded checkpoints through `torch.distributed.checkpoint`, published by an atomic rename.

`RUN/checkpoints/<global step>-<stage>/` holds one DCP shard per rank and `position.json`. A folder with that name is
complete: it was written under another name (ending in `.partial`), flushed to the disk, and renamed. A folder to be
removed is renamed back first, so that a kill at any moment leaves the one before and nothing that looks complete.
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
    """What went wrong on the first rank that failed, instead of torch's summary, which is not even an `Exception`."""
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
    """Writes and publishes a checkpoint, then drops old ones (see `prune`); a collective.

    `position` needs `step` (the next global step) and `stage`; `average` is that of the weights, if one is kept. An
    error of one rank is raised by all.
    """
    final = run / "checkpoints" / f"{position['step']:07d}-{position['stage']}"
    # a name of its own: a rank of an earlier try that is not quite dead yet must not write into this one
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
        except Exception as error:  # the others wait to be told
            failure = error
    told = parallel.from_first_rank(failure)
    if told is not None:
        raise failure or told
    return final


def _aside(final: Path, token: str) -> Path:
    """The name of a folder while it is not, or no longer, complete."""
    return final.with_name(f"{final.name}.{token}{PARTIAL}")


def _publish(partial: Path, final: Path, position: dict[str, Any]) -> None:
    with open(partial / POSITION, "w") as file:
        json.dump(position, file)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # torn: a complete one of this step would have been resumed from
        final.rename(_aside(final, uuid.uuid4().hex[:8]))
    sync(partial)
    os.replace(partial, final)
    sync(final.parent)


def complete(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (p for p in Path(run).glob("checkpoints/*") if p.suffix != PARTIAL)
    return sorted(p for p in found if (p / POSITION).is_file() and (p / ".metadata").is_file())


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the newest of each stage; 0 keeps all."""
    found = complete(run)
    newest = {position(path)["stage"]: path for path in found}
    for path in found[:-keep] if keep else []:
        if path not in newest.values():
            path.rename(_aside(path, uuid.uuid4().hex[:8]))
    clean(run)


def clean(run: Path) -> None:
    """Removes what kills left behind. Only for the one process that writes to the run's folder."""
    for path in Path(run).glob(f"checkpoints/*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is in nobody's way


def latest(run: str | Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max(complete(run), default=None)


def latest_of_ranks(run: str | Path) -> Path | None:
    """`latest` as the first rank sees it; a collective. Shared storage may show other ranks an older listing."""
    newest = latest(run) if parallel.rank() == 0 else None
    name = parallel.from_first_rank(newest and newest.name)
    return Path(run) / "checkpoints" / name if name else None


def position(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / POSITION).read_text())


def start_step(checkpoint: Path | None) -> int:
    """The global step that a run goes on with."""
    return position(checkpoint)["step"] if checkpoint else 0


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
    state = {"model": changing_state(model)}
    with _plain_errors():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=parallel.world_size() == 1)
    model.load_state_dict(state["model"], strict=not frozen_names(model))


def load_average(checkpoint: Path, average: dict[str, Tensor]) -> None:
    """The average of the weights in place; a collective."""
    with _plain_errors():
        dcp.load({"average": average}, checkpoint_id=checkpoint, no_dist=parallel.world_size() == 1)


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state; only valid for a checkpoint inside the stage that the optimizer was built for.

    A parameter that had no gradient so far has no state in the checkpoint, and gets none.
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
