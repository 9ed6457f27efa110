"""A training step of each decoder of a preset: compiled against eager, and in bf16 against fp32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.bench.training_step import batch_of, link_of, read_preset, training_step
from lumen_ray.inference.device import find_device
from lumen_ray.model.build import build_decoder
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train.blocks import check_compiler, compile_module

PLAIN = {"bf16": "fp32", "compiled": "eager"}
#: how far each loss of a compiled step may be from the eager one's, relative. In bf16 none is held to it: fresh weights
#: find every place alike, so that rounding says which become queries; tests compare what queries are made of instead
COMPILED_TOLERANCE = 0.01
#: deviation of the noise that is added to fresh weights, so that places differ enough to be chosen alike
SCRAMBLE = 0.05
Step = Callable[[], dict[str, float]]


def check(preset: str, names: Sequence[str] | None) -> None:
    """`UserError` for a decoder that the preset has not, or where nothing can be compiled."""
    read_preset(preset, names)
    check_compiler(torch.device(find_device()))


def bench(
    preset: str = "nano-experts", names: Sequence[str] | None = None, images: int = 2, turns: int = 3, repeats: int = 3
) -> Iterator[Result]:
    """Images per second of both sides, on the GPU where there is one; no speed where losses differ."""
    settings, names = read_preset(preset, names)
    for how in PLAIN:
        for name in names:
            try:
                yield _measure(settings, name, how, images, turns, repeats)
            except SidesDiffer as error:
                yield Result(f"{how}/{name}", "images/s", {}, failed=str(error))


def _measure(settings: ModelSettings, name: str, how: str, images: int, turns: int, repeats: int) -> Result:
    device, losses, seconds = torch.device(find_device()), {}, {}
    sides = {side: _side(settings, name, side, images, device) for side in (how, PLAIN[how])}
    for side, step in sides.items():
        began = time.perf_counter()
        torch.manual_seed(1)  # of noise
        losses[side] = step()
        seconds[side] = round(time.perf_counter() - began, 1)
    apart = furthest(*losses.values())
    if how == "compiled" and not apart <= COMPILED_TOLERANCE:
        raise SidesDiffer(f"a loss differs by {apart:.1%}, more than {COMPILED_TOLERANCE:.0%}: {losses}")

    def rate(step: Step) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return repeats * images / (time.perf_counter() - began)

    return Result(
        f"{how}/{name}",
        "images/s",
        in_turns({side: lambda step=step: rate(step) for side, step in sides.items()}, turns),
        equal=f"each loss to {apart:.1e} (at most {COMPILED_TOLERANCE:g})" if how == "compiled" else "",
        budget=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        details={
            "preset": settings.name,
            "images": images,
            "first_step_seconds": seconds,
            "largest_relative_difference_of_a_loss": apart,
        },
    )


def furthest(ours: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """The largest relative difference of a loss."""
    return max(abs(ours[name] - value) / max(abs(value), 1e-6) for name, value in wanted.items())


def _side(settings: ModelSettings, name: str, side: str, images: int, device: torch.device) -> Step:
    """A step that gives its losses, which waits for the device. Weights, links and batch are the same for all sides."""
    torch.manual_seed(0)
    batch, decoder = batch_of(settings, name, images), build_decoder(settings, name).to(device).train()
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape).to(device), alpha=SCRAMBLE)
    link = link_of(batch, decoder, settings).to(device)
    if side == "compiled":
        compile_module(decoder, device)
    step = training_step(decoder, settings, batch.to(device), link, low=side == "bf16")
    return lambda: {name: float(value) for name, value in step().items()}
