"""What a training step of each decoder of a preset needs in memory, in the preset's own sizes, on the CPU.

The trunk is not built: what a decoder is given, links and dense features, are random numbers in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lumen_ray import config
from lumen_ray.bench import gpu
from lumen_ray.bench.timing import Result
from lumen_ray.data import scenes, scenes_edits
from lumen_ray.data.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.decoders.base import Decoder, ImageDecoder
from lumen_ray.errors import unknown
from lumen_ray.model.build import given
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.superlink import SuperLink
from lumen_ray.precision import arithmetic
from lumen_ray.presets import model_path
from lumen_ray.tasks import TASKS, decoder_class
from lumen_ray.train.blocks import checkpoint_module


def read_preset(preset: str, names: Sequence[str] | None) -> tuple[ModelSettings, tuple[str, ...]]:
    """Its settings, and of its decoders those that are named, by default all. `UserError` for one that it has not."""
    settings = config.load(ModelSettings, model_path(preset))
    for name in names or ():
        if name not in settings.decoder_names:
            raise unknown("decoder", name, settings.decoder_names, plural="decoders")
    return settings, tuple(names or settings.decoder_names)


def bench(
    preset: str = "nano-experts", names: Sequence[str] | None = None, images: int = 2, checkpointed: bool = False
) -> list[Result]:
    """MiB that a forward and backward pass of each decoder allocates at most, beside weights, gradients and inputs, on
    scenes with all that it can learn from them; `checkpointed`: as with `activation_checkpointing` in a recipe."""
    settings, names = read_preset(preset, names)
    return [_measure(settings, name, images, checkpointed) for name in names]


def _measure(settings: ModelSettings, name: str, images: int, checkpointed: bool) -> Result:
    torch.manual_seed(0)
    batch, decoder = batch_of(settings, name, images), decoder_class(name).build(settings).train()
    if checkpointed:
        checkpoint_module(decoder)
    link = link_of(batch, decoder, settings)
    step = training_step(decoder, settings, batch, link)
    began = time.perf_counter()
    step()  # allocates the gradients of the weights; at full size a step takes minutes, so no other is timed
    seconds = time.perf_counter() - began
    peak = peak_memory(step)
    size = settings.own_sizes.get(name, f"{settings.image_size} pixels")
    asked = len(link.group.unique())
    return Result(
        f"memory/{name}",
        "MiB",
        {"a training step": [peak / 2**20]},
        details={
            "preset": settings.name,
            "images": images,
            "groups": asked,
            "activation_checkpointing": checkpointed,
            "seconds": round(seconds, 2),
        },
        note=f"{images} image{'s' if images > 1 else ''} and {asked} requests at {size}, {seconds:.1f} s on "
        f"{torch.get_num_threads()} threads; without its weights, gradients and inputs, trunk and optimiser",
    )


def batch_of(settings: ModelSettings, name: str, images: int) -> dict[str, Any]:
    """All that a decoder can learn from some scenes, as the collator gives it."""
    side, tokenizer = settings.image_size, gpu.make_tokenizer(settings)
    rows = [
        scenes_edits.with_edit(scenes.scene_row(0, i, side), scenes_edits.scene_edit(0, i, side)) for i in range(images)
    ]
    tasks = tuple(task.name for task in TASKS.values() if name in task.decoders)
    pictures, edited = ([row[key] and decode(row[key]) for row in rows] for key in ("image", "target_image"))
    rngs = [np.random.default_rng(i) for i in range(images)]
    collator = Collator(tokenizer, side, tasks, scenes.SKELETONS, own_sizes=settings.own_sizes)
    return collator(rows, pictures, rngs, edited)


def link_of(batch: dict[str, Any], decoder: Decoder | ImageDecoder, settings: ModelSettings) -> SuperLink:
    """Random numbers where the trunk would say what the batch asks."""
    layout, family = batch["layout"], decoder.family
    places = (part[family] for part in (layout.link_images, layout.link_parents, layout.link_groups))
    if isinstance(decoder, ImageDecoder):
        shape = (decoder.settings.num_tokens, decoder.width)
    else:
        shape = (settings.link_width(decoder.name),)
    return SuperLink(decoder.name, torch.randn(len(layout.link_images[family]), *shape).requires_grad_(), *places)


def training_step(
    decoder: Decoder | ImageDecoder,
    settings: ModelSettings,
    batch: dict[str, Any],
    link: SuperLink,
    low: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """A forward pass of what a decoder learns, with `low` in bf16, and its backward pass; it gives the losses."""
    view, targets = given(decoder, batch)
    if decoder.reads == "dense":
        side = settings.image_size // 4
        view = torch.randn(len(batch["images"]), settings.dense_channels, side, side)
        view = view.to(link.embeddings.device).requires_grad_()

    def step() -> dict[str, Tensor]:
        decoder.zero_grad(set_to_none=False)
        with arithmetic(low, link.embeddings.device):
            losses = decoder.losses(link, view, targets)
        sum(term.total for term in losses.values()).backward()
        return {name: term.total.detach() for name, term in losses.items()}

    return step


def peak_memory(step: Callable[[], object]) -> int:
    """Bytes that `step` has allocated at most at one time on the CPU, of those it allocates itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
