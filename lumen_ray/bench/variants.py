"""A training step of each decoder of a preset: compiled against eager, and in bf16 against fp32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.bench.training_step import random_link, read_preset, scene_batch, training_step
from lumen_ray.inference.device import find_device
from lumen_ray.model.build import build_decoder
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train.blocks import check_compiler, compile_module

BASELINES = {"bf16": "fp32", "compiled": "eager"}
#: relative tolerance of each loss of a compiled step. It does not apply to bf16: with fresh weights all places score
#: alike, so rounding decides which become queries; tests compare the tensors that queries are made from instead
COMPILED_TOLERANCE = 0.01
#: deviation of the noise added to fresh weights, so that places score differently and both sides choose the same
SCRAMBLE = 0.05
Step = Callable[[], dict[str, float]]


def check(preset: str, names: Sequence[str] | None) -> None:
    """Raises `UserError` for a decoder that the preset lacks, or where torch.compile does not work."""
    read_preset(preset, names)
    check_compiler(torch.device(find_device()))


def bench(
    preset: str = "nano-experts", names: Sequence[str] | None = None, images: int = 2, turns: int = 3, repeats: int = 3
) -> Iterator[Result]:
    """Images per second of both sides, on a GPU if there is one; a failed result if losses differ."""
    settings, names = read_preset(preset, names)
    for variant in BASELINES:
        for name in names:
            try:
                yield _measure(settings, name, variant, images, turns, repeats)
            except SidesDiffer as error:
                yield Result(f"{variant}/{name}", "images/s", {}, failed=str(error))


def _measure(settings: ModelSettings, name: str, variant: str, images: int, turns: int, repeats: int) -> Result:
    device, losses, seconds = torch.device(find_device()), {}, {}
    sides = {side: _make_step(settings, name, side, images, device) for side in (variant, BASELINES[variant])}
    for side, step in sides.items():
        began = time.perf_counter()
        torch.manual_seed(1)  # of the noise
        losses[side] = step()
        seconds[side] = round(time.perf_counter() - began, 1)
    difference = largest_difference(*losses.values())
    if variant == "compiled" and not difference <= COMPILED_TOLERANCE:
        raise SidesDiffer(f"a loss differs by {difference:.1%}, more than {COMPILED_TOLERANCE:.0%}: {losses}")

    def rate(step: Step) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return repeats * images / (time.perf_counter() - began)

    return Result(
        f"{variant}/{name}",
        "images/s",
        in_turns({side: partial(rate, step) for side, step in sides.items()}, turns),
        equal=f"each loss to {difference:.1e} (at most {COMPILED_TOLERANCE:g})" if variant == "compiled" else "",
        budget=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        details={
            "preset": settings.name,
            "images": images,
            "first_step_seconds": seconds,
            "largest_relative_difference_of_a_loss": difference,
        },
    )


def largest_difference(losses: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """The largest relative difference of a loss."""
    return max(abs(losses[name] - value) / max(abs(value), 1e-6) for name, value in expected.items())


def _make_step(settings: ModelSettings, name: str, side: str, images: int, device: torch.device) -> Step:
    """A step of one side, which returns its losses and so waits for the device. Weights, links and batch are the same
    for all sides."""
    torch.manual_seed(0)
    batch, decoder = scene_batch(settings, name, images), build_decoder(settings, name).to(device).train()
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape).to(device), alpha=SCRAMBLE)
    link = random_link(batch, decoder, settings).to(device)
    if side == "compiled":
        compile_module(decoder, device)
    step = training_step(decoder, settings, batch.to(device), link, bf16=side == "bf16")
    return lambda: {name: float(value) for name, value in step().items()}
