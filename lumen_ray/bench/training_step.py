"""A training step of one decoder of a preset, in the preset's own sizes.

The trunk is not built: what a decoder is given, links and dense features, are random numbers in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lumen_ray import config
from lumen_ray.bench import gpu
from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.decoders.base import Decoder, ImageDecoder
from lumen_ray.decoders.registry import serves
from lumen_ray.errors import unknown
from lumen_ray.model.build import given
from lumen_ray.model.settings import ModelSettings
from lumen_ray.precision import autocast_context
from lumen_ray.presets import model_path
from lumen_ray.superlink import SuperLink
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.batch import TrainingBatch


def read_preset(preset: str, names: Sequence[str] | None) -> tuple[ModelSettings, tuple[str, ...]]:
    """Its settings, and of its decoders those that are named, by default all. `UserError` for one that it has not."""
    settings = config.load(ModelSettings, model_path(preset))
    for name in names or ():
        if name not in settings.decoder_names:
            raise unknown("decoder", name, settings.decoder_names, plural="decoders")
    return settings, tuple(names or settings.decoder_names)


def batch_of(settings: ModelSettings, name: str, images: int) -> TrainingBatch:
    """All that a decoder can learn from some scenes, as the collator gives it."""
    side, tokenizer = settings.image_size, gpu.make_tokenizer(settings)
    rows = [
        scenes_edits.with_edit(scenes.scene_row(0, i, side), scenes_edits.scene_edit(0, i, side)) for i in range(images)
    ]
    tasks = tuple(task for task in TASKS if serves(name, task))
    pictures, edited = ([row[key] and decode(row[key]) for row in rows] for key in ("image", "target_image"))
    rngs = [np.random.default_rng(i) for i in range(images)]
    collator = Collator(tokenizer, side, tasks, scenes.SKELETONS, input_rules=settings.input_rules)
    return collator(rows, pictures, rngs, edited)


def link_of(batch: TrainingBatch, decoder: Decoder | ImageDecoder, settings: ModelSettings) -> SuperLink:
    """Random numbers where the trunk would say what the batch asks."""
    layout, family = batch.layout, decoder.family
    places = (part[family] for part in (layout.link_images, layout.link_parents, layout.link_groups))
    if isinstance(decoder, ImageDecoder):
        shape = (decoder.settings.num_tokens, decoder.width)
    else:
        shape = (settings.sections[decoder.name].link_width(settings.link_channels),)
    return SuperLink(decoder.name, torch.randn(len(layout.link_images[family]), *shape).requires_grad_(), *places)


def training_step(
    decoder: Decoder | ImageDecoder,
    settings: ModelSettings,
    batch: TrainingBatch,
    link: SuperLink,
    low: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """A forward pass of what a decoder learns, with `low` in bf16, and its backward pass; it gives the losses."""
    view, targets = given(decoder, batch)
    if decoder.reads == "dense":
        side = settings.image_size // 4
        view = torch.randn(len(batch.images), settings.dense_channels, side, side)
        view = view.to(link.embeddings.device).requires_grad_()

    def step() -> dict[str, Tensor]:
        decoder.zero_grad(set_to_none=False)
        with autocast_context(low, link.embeddings.device):
            losses = decoder.losses(link, view, targets)
        sum(term.total for term in losses.values()).backward()
        return {name: term.total.detach() for name, term in losses.items()}

    return step
