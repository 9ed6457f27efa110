"""Tiny runs on a few synthetic scenes, without Ray."""

from pathlib import Path

import torch
import yaml
from tiny_models import SIDE, tiny_settings

from lumen_ray.data.prepare import prepare_scenes
from lumen_ray.train.recipe import Recipe
from lumen_ray.train.trainer import Prepared, prepare_job

torch.set_num_threads(1)


def make_shards(folder: Path) -> Path:
    """32 scenes in row groups of 4, and the preset beside them."""
    prepare_scenes(folder / "shards", 32, side=SIDE, rows_per_group=4, workers=0)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(vocab_size=330).model_dump(mode="json")))
    return folder


def make_recipe(folder: Path, stages=((4, None), (4, ["lumen"])), **changes) -> Recipe:
    """`stages`: (steps, trainable or None for all)."""
    made = [
        {"name": f"s{i}", "steps": steps, "warmup_steps": 2} | ({"trainable": parts} if parts else {})
        for i, (steps, parts) in enumerate(stages)
    ]
    data = {"name": "tiny", "model": str(folder / "tiny.yaml"), "batch_size": 8, "stages": made}
    return Recipe.model_validate(data | changes)


def make_job(folder: Path, run: Path, **changes) -> Prepared:
    return prepare_job(folder / "shards", make_recipe(folder, **changes), run)
