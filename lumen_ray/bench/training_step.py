"""A training step of one decoder of a preset, at the preset's sizes.

The trunk is not built: random numbers take the place of links and dense features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray import config
from lumen_ray.bench import gpu
from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.decoders.base import Decoder, ImageDecoder, Learner
from lumen_ray.decoders.registry import serves
from lumen_ray.errors import unknown
from lumen_ray.model.build import images_and_targets
from lumen_ray.model.settings import ModelSettings
from lumen_ray.precision import autocast_context
from lumen_ray.presets import model_path
from lumen_ray.superlink import SuperLink
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.batch import TrainingBatch


def read_preset(preset: str, names: Sequence[str] | None) -> tuple[ModelSettings, tuple[str, ...]]:
    """Settings of a preset, and names of its decoders: the given ones, by default all. Raises `UserError` for one that
    it lacks."""
    settings = config.load(ModelSettings, model_path(preset))
    for name in names or ():
        if name not in settings.decoder_names:
            raise unknown("decoder", name, settings.decoder_names, plural="decoders")
    return settings, tuple(names or settings.decoder_names)


def scene_batch(settings: ModelSettings, name: str, images: int) -> TrainingBatch:
    """A batch of rendered scenes with prompts for all tasks of a decoder."""
    side, tokenizer = settings.image_size, gpu.make_tokenizer(settings)
    rows = [
        scenes_edits.with_edit(scenes.scene_row(0, i, side), scenes_edits.scene_edit(0, i, side)) for i in range(images)
    ]
    tasks = tuple(task for task in TASKS if serves(name, task))
    pictures, edited = ([row[key] and decode(row[key]) for row in rows] for key in ("image", "target_image"))
    rngs = [np.random.default_rng(i) for i in range(images)]
    collator = Collator(tokenizer, side, tasks, scenes.SKELETONS, input_rules=settings.input_rules)
    return collator(rows, pictures, rngs, edited)


def random_link(batch: TrainingBatch, decoder: Decoder | ImageDecoder, settings: ModelSettings) -> SuperLink:
    """The super link of the batch's prompts for a decoder, with random embeddings."""
    layout, family = batch.layout, decoder.family
    columns = (layout.link_images, layout.link_parents, layout.link_groups)
    images, parents, groups = (column[family] for column in columns)
    shape: tuple[int, ...] = (settings.sections[decoder.name].link_width(settings.link_channels),)
    if isinstance(decoder, ImageDecoder):
        pictures: Any = decoder  # its settings and width are of the class that makes pictures
        shape = (pictures.settings.num_tokens, pictures.width)
    return SuperLink(decoder.name, torch.randn(len(images), *shape).requires_grad_(), images, parents, groups)


def training_step(
    decoder: Decoder | ImageDecoder,
    settings: ModelSettings,
    batch: TrainingBatch,
    link: SuperLink,
    bf16: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """A function that does the forward and backward pass of a decoder's losses and returns them."""
    learner: Learner = decoder
    view: Any
    view, targets = images_and_targets(decoder, batch)
    if decoder.reads == "dense":
        side = settings.image_size // 4
        view = torch.randn(len(batch.images), settings.dense_channels, side, side)
        view = view.to(link.embeddings.device).requires_grad_()

    def step() -> dict[str, Tensor]:
        decoder.zero_grad(set_to_none=False)
        with autocast_context(bf16, link.embeddings.device):
            losses = learner.losses(link, view, targets)
        total = sum(term.total for term in losses.values())
        assert isinstance(total, Tensor)
        total.backward()
        return {name: term.total.detach() for name, term in losses.items()}

    return step
