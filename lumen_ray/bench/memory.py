"""Memory of a training step of each decoder of a preset, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from lumen_ray.bench.timing import Result
from lumen_ray.bench.training_step import random_link, read_preset, scene_batch, training_step
from lumen_ray.model.build import build_decoder
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train.blocks import checkpoint_module


def bench(
    preset: str = "nano-experts", names: Sequence[str] | None = None, images: int = 2, checkpointed: bool = False
) -> Iterator[Result]:
    """Peak MiB that a forward and backward pass of each decoder allocates, without weights, gradients and inputs, on
    scenes with prompts of all its tasks; `checkpointed`: as with `activation_checkpointing` in a recipe."""
    settings, names = read_preset(preset, names)
    for name in names:
        yield _measure(settings, name, images, checkpointed)


def _measure(settings: ModelSettings, name: str, images: int, checkpointed: bool) -> Result:
    torch.manual_seed(0)
    batch, decoder = scene_batch(settings, name, images), build_decoder(settings, name).train()
    if checkpointed:
        checkpoint_module(decoder)
    link = random_link(batch, decoder, settings)
    step = training_step(decoder, settings, batch, link)
    began = time.perf_counter()
    step()  # also allocates the gradients; timed because another step would take minutes at full size
    seconds = time.perf_counter() - began
    peak = peak_memory(step)
    size = settings.input_rules.get(name, f"{settings.image_size} pixels")
    assert link.group is not None
    groups = len(link.group.unique())
    return Result(
        f"memory/{name}",
        "MiB",
        {"a training step": [peak / 2**20]},
        details={
            "preset": settings.name,
            "images": images,
            "groups": groups,
            "activation_checkpointing": checkpointed,
            "seconds": round(seconds, 2),
        },
        note=f"{images} image{'s' if images > 1 else ''} and {groups} requests at {size}, {seconds:.1f} s on "
        f"{torch.get_num_threads()} threads; without weights, gradients, inputs, trunk and optimizer",
    )


def peak_memory(step: Callable[[], object]) -> int:
    """Peak bytes that `step` allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
