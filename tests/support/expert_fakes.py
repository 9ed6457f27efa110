"""A tiny model of all four experts, and a training batch for each."""

from typing import Any

import numpy as np

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.model.build import Generalist
from lumen_ray.trunk.batch import TrainingBatch
from support.tiny_models import EXPERTS, SIDE, tiny_model, tiny_settings, tiny_tokenizer

#: a task of each expert
TASKS = {
    "grounding_dino": "segment",
    "unipose": "pose",
    "stable_diffusion": "generate",
    "instruct_pix2pix": "edit",
}


def expert_model(seed: int = 0, dropping: bool = False, **changes: Any) -> Generalist:
    """`dropping`: with dropout and the like wherever there can be some, beside the noise of denoising and diffusion."""
    sections = {name: dict(keys) for name, keys in EXPERTS.items()}
    for keys in sections.values():
        if "backbone" in keys:
            keys |= {"denoising_queries": 8, "learned_class_scale": True}
        if dropping and "backbone" in keys:
            backbone = keys["backbone"] | {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1}
            keys |= {"backbone": backbone, "dropout": 0.1, "fusion_drop_path": 0.3}
        elif dropping:
            keys["unet"] = keys["unet"] | {"dropout": 0.1}
    return tiny_model(seed, lumen=None, **(sections | changes)).train()


def expert_batch(task: str, count: int = 2, seed: int = 0) -> TrainingBatch:
    """`count` scenes with prompts of `task`."""
    rows = [scenes.scene_row(seed, n, SIDE) for n in range(count)]
    if task == "edit":
        rows = [scenes_edits.with_edit(row, scenes_edits.scene_edit(seed, n, SIDE)) for n, row in enumerate(rows)]
    pictures, edited = (
        [None if row[key] is None else decode(row[key]) for row in rows] for key in ("image", "target_image")
    )
    rngs = [np.random.default_rng((seed, n)) for n in range(count)]
    collator = Collator(
        tiny_tokenizer(), SIDE, (task,), scenes.SKELETONS, input_rules=tiny_settings(**EXPERTS).input_rules
    )
    return collator(rows, pictures, rngs, edited)
