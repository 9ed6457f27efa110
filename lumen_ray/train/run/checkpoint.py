"""Sharded checkpoints through `torch.distributed.checkpoint`, in a folder or a bucket, published by one file.

`RUN/checkpoints/<global step>-<stage>/` holds `position.json` and, in a folder with a random name, one DCP shard per
rank. `position.json` is written last and atomically, and names all files with their sizes: a checkpoint is complete if
they are there. To remove one, `position.json` goes first. So a kill at any moment leaves the previous checkpoint, and
none that only looks complete.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lumen_ray.checkpoints.safetensors_file import sync
from lumen_ray.data import files, urls
from lumen_ray.data.files import StoreError
from lumen_ray.data.urls import Location
from lumen_ray.errors import UserError
from lumen_ray.train import parallel
from lumen_ray.train.lora import changing_state, frozen_names
from lumen_ray.train.run import store

FOLDER = "checkpoints"
POSITION = "position.json"
METADATA = ".metadata"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises the error of the first rank that failed in place of torch's summary, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """This rank's shard of what a checkpoint holds; the tensors are those that training changes. A collective.

    `average`: the moving average of the weights, if there is one.
    """
    state = {"model": changing_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return state if average is None else state | {"average": average}


def save(
    run: Location,
    position: dict[str, Any],
    state: dict[str, Any],
    keep: int = 0,
    group: dist.ProcessGroup | None = None,
) -> str:
    """Writes and publishes a checkpoint, then removes old ones (see `prune`); a collective of `group`.

    `position` needs `step` (the next global step) and `stage`; `state`: of `state_of`, or a copy. An error on one rank
    is raised on all.
    """
    final = urls.join(run, FOLDER, f"{position['step']:07d}-{position['stage']}")
    # a random name: a rank of an earlier try that is still alive must not write into this folder
    shards = parallel.from_first_rank(uuid.uuid4().hex[:8], group)
    with _plain_errors():
        writer = store.writer(urls.join(final, shards))
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=parallel.world_size() == 1)
    failure = None
    if parallel.rank() == 0:
        try:
            _publish(final, shards, position)
            prune(run, keep)
        except Exception as error:  # raised below, after the other ranks have got it
            failure = error
    parallel.raise_together(failure, group)
    return final


def _publish(final: str, shards: str, position: dict[str, Any]) -> None:
    written = {f"{shards}/{name}": size for name, size in files.sizes(urls.join(final, shards)).items()}
    if not urls.is_url(final):
        sync(Path(final, shards))
    files.write_bytes(urls.join(final, POSITION), json.dumps({**position, "shards": shards, "files": written}).encode())
    if not urls.is_url(final):
        sync(Path(final))
        sync(Path(final).parent)


def complete(run: Location) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(_complete(run, files.sizes(urls.join(run, FOLDER))))


def _complete(run: Location, sizes: Mapping[str, int]) -> dict[str, str]:
    """Complete checkpoints, with the name of their folder of shards. `sizes`: of all files in `RUN/checkpoints`."""
    found = {}
    for name in (file.removesuffix(f"/{POSITION}") for file in sizes if file.endswith(f"/{POSITION}")):
        path = urls.join(run, FOLDER, name)
        try:
            written = position(path)
        except StoreError:
            raise
        except UserError:  # removed since `sizes` was listed
            continue
        expected = written.get("files") or {METADATA: sizes.get(f"{name}/{METADATA}")}
        if all(size is not None and sizes.get(f"{name}/{file}") == size for file, size in expected.items()):
            found[path] = written.get("shards", "")
    return found


def prune(run: Location, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the newest of each stage; 0 keeps all."""
    checkpoints = complete(run)
    newest = {position(path)["stage"]: path for path in checkpoints}
    for path in checkpoints[:-keep] if keep else []:
        if path not in newest.values():
            files.remove(urls.join(path, POSITION))
    clean(run)


def clean(run: Location) -> None:
    """Removes what killed tries left of checkpoints. Only for the process that holds the run folder."""
    sizes = files.sizes(urls.join(run, FOLDER))
    kept = _complete(run, sizes)
    folders = {name.split("/")[0] for name in sizes}
    for path in (urls.join(run, FOLDER, folder) for folder in folders):
        if path not in kept:
            files.remove(urls.join(path, POSITION))
            _remove_shards(path)
        elif kept[path]:
            inside = {name.split("/")[1] for name in sizes if name.startswith(f"{urls.base_name(path)}/")}
            for other in inside - {kept[path], POSITION}:
                _remove_shards(urls.join(path, other))


def _remove_shards(folder: str) -> None:
    if urls.is_url(folder):
        files.remove_folder(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a folder that stays does no harm


def latest(run: Location) -> str | None:
    """The newest complete checkpoint of a run."""
    return max(complete(run), default=None)


def latest_of_ranks(run: Location) -> str | None:
    """`latest` of the first rank, on all ranks; a collective. Shared storage may list older files on other ranks."""
    return parallel.from_first_rank(latest(run) if parallel.rank() == 0 else None)


def position(checkpoint: Location) -> dict[str, Any]:
    """`step`, `stage` and `preset`, and of what files the checkpoint consists."""
    return json.loads(files.read_text(urls.join(checkpoint, POSITION)))


def shards_of(checkpoint: Location) -> str:
    """The folder with the shards of a checkpoint; those of earlier versions lie beside `position.json`."""
    return urls.join(checkpoint, position(checkpoint).get("shards", ""))


def start_step(checkpoint: Location | None) -> int:
    """The first global step of a run that resumes from the checkpoint."""
    return position(checkpoint)["step"] if checkpoint else 0


def check_preset(checkpoint: Location, preset: str) -> None:
    """Raises `UserError` if the checkpoint is of another preset."""
    saved = position(checkpoint)["preset"]
    if saved != preset:
        raise UserError(
            f"'{urls.shown(checkpoint)}' holds a checkpoint of preset '{saved}', not '{preset}'; use another output "
            f"folder or train preset '{saved}'",
            "wrong_preset",
        )


def _load(checkpoint: Location, state: dict[str, Any], planner: DefaultLoadPlanner | None = None) -> set[str]:
    """Fills the tensors of `state`; a collective. Returns the names of all that the checkpoint holds."""
    reader = store.reader(shards_of(checkpoint))
    with _plain_errors():
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=parallel.world_size() == 1)
    return set(reader.read_metadata().state_dict_metadata)


def load_weights(checkpoint: Location, model: nn.Module) -> None:
    """Loads the weights of a checkpoint into a model, sharded over any number of ranks; a collective."""
    state = {"model": changing_state(model)}
    _load(checkpoint, state)
    model.load_state_dict(state["model"], strict=not frozen_names(model))


def load_average(checkpoint: Location, average: dict[str, Tensor]) -> None:
    """Loads the moving average of the weights, in place; a collective."""
    _load(checkpoint, {"average": average})


def load_optimizer(checkpoint: Location, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state; only valid for a checkpoint inside the stage that the optimizer was built for.

    A parameter without gradients so far has no state in the checkpoint, and gets none.
    """
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    saved = _load(checkpoint, state, DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for name, parameter in model.named_parameters():
        if f"optimizer.state.{name}.step" not in saved:
            optimizer.state.pop(parameter, None)
