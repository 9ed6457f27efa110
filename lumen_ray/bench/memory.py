"""What a training step of each decoder of a preset needs in memory, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from lumen_ray.bench.timing import Result
from lumen_ray.bench.training_step import batch_of, link_of, read_preset, training_step
from lumen_ray.model.build import build_decoder
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train.blocks import checkpoint_module


def bench(
    preset: str = "nano-experts", names: Sequence[str] | None = None, images: int = 2, checkpointed: bool = False
) -> Iterator[Result]:
    """MiB that a forward and backward pass of each decoder allocates at most, beside weights, gradients and inputs, on
    scenes with all that it can learn from them; `checkpointed`: as with `activation_checkpointing` in a recipe."""
    settings, names = read_preset(preset, names)
    for name in names:
        yield _measure(settings, name, images, checkpointed)


def _measure(settings: ModelSettings, name: str, images: int, checkpointed: bool) -> Result:
    torch.manual_seed(0)
    batch, decoder = batch_of(settings, name, images), build_decoder(settings, name).train()
    if checkpointed:
        checkpoint_module(decoder)
    link = link_of(batch, decoder, settings)
    step = training_step(decoder, settings, batch, link)
    began = time.perf_counter()
    step()  # allocates the gradients of the weights; at full size a step takes minutes, so no other is timed
    seconds = time.perf_counter() - began
    peak = peak_memory(step)
    size = settings.input_rules.get(name, f"{settings.image_size} pixels")
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
