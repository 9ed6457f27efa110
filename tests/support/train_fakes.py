"""Tiny runs on a few synthetic scenes, without Ray."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.model.build import open_weights
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import PreparedRun, prepare_job
from lumen_ray.train.run import checkpoint
from support.ranks import CONTEXT
from support.tiny_models import SIDE, tiny_settings

torch.set_num_threads(1)


def make_shards(folder: Path, **changes) -> Path:
    """32 scenes in row groups of 4, and beside them the preset, with `changes` of its keys."""
    prepare_source(folder / "shards", ScenesSource(32, side=SIDE), rows_per_group=4, workers=0)
    settings = tiny_settings(vocab_size=330, **changes)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return folder


def make_recipe(folder: Path, stages=((4, None), (4, ["lumen"])), **changes) -> Recipe:
    """`stages`: (steps, trainable or None for all)."""
    made = [
        {"name": f"s{i}", "steps": steps, "warmup_steps": 2} | ({"trainable": parts} if parts else {})
        for i, (steps, parts) in enumerate(stages)
    ]
    data = {"name": "tiny", "model": str(folder / "tiny.yaml"), "batch_size": 8, "stages": made}
    return Recipe.model_validate(data | changes)


def make_job(folder: Path, run: Path, **changes) -> PreparedRun:
    return prepare_job(folder / "shards", make_recipe(folder, **changes), run)


def job_of(folder: Path, run: Path, *stages: dict, **changes) -> PreparedRun:
    """A run of stages given as in a recipe's YAML, `name` and `warmup_steps` filled in."""
    made = [{"name": f"s{i}", "warmup_steps": 2} | stage for i, stage in enumerate(stages)]
    data = {"name": "tiny", "model": str(folder / "tiny.yaml"), "batch_size": 8, "stages": made}
    return prepare_job(folder / "shards", Recipe.model_validate(data | changes), run)


def log_of(run: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """What a run exported, tied weights under both names."""
    return dict(open_weights(run / "model"))


def cut_after(run: Path, step: int) -> None:
    """Puts a finished run back to its checkpoint of `step`, as if it had been killed later."""
    shutil.rmtree(run / "model")
    for path in checkpoint.complete(run):
        if checkpoint.position(path)["step"] > step:
            shutil.rmtree(path)


def on_two_ranks(function: Callable, *args) -> None:
    """Calls `function(*args)` in two processes of a gloo group; fails when one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        group = [CONTEXT.Process(target=in_group, args=(rank, f"{folder}/store", function, args)) for rank in (0, 1)]
        for process in group:
            process.start()
        for process in group:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in group] == [0, 0]


def in_group(rank: int, store: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=120), 2, rank)
    function(*args)
    dist.destroy_process_group()
