"""A training step of each decoder of a preset: compiled against eager, and in bf16 against fp32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from lumen_ray.bench.memory import batch_of, link_of, read_preset, training_step
from lumen_ray.bench.timing import Result, in_turns
from lumen_ray.model.settings import ModelSettings
from lumen_ray.precision import arithmetic
from lumen_ray.tasks import decoder_class
from lumen_ray.train.batch import to_device
from lumen_ray.train.blocks import compile_module

#: how far losses may be apart, relative: other kernels round otherwise, and another place may win a query by rounding
TOLERANCE = {"compiled": 0.01, "bf16": 0.1}
PLAIN = {"compiled": "eager", "bf16": "fp32"}


def bench(
    preset: str = "nano-experts", names: Sequence[str] | None = None, images: int = 2, turns: int = 3, repeats: int = 3
) -> list[Result]:
    """Images per second of both sides, on the GPU where there is one; refuses to report a speed when losses differ."""
    settings, names = read_preset(preset, names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_measure(settings, name, how, images, turns, repeats, device) for name in names for how in PLAIN]


def _measure(
    settings: ModelSettings, name: str, how: str, images: int, turns: int, repeats: int, device: torch.device
) -> Result:
    sides = {side: _side(settings, name, side, images, device) for side in (how, PLAIN[how])}
    losses, began = {}, time.perf_counter()
    for side, step in sides.items():
        torch.manual_seed(1)  # of noise
        losses[side] = step()
        if side == how:
            warm = time.perf_counter() - began
    ours, wanted = losses.values()
    apart = abs(ours - wanted) / abs(wanted)
    if not apart < TOLERANCE[how]:
        raise RuntimeError(f"{name}: {how} and {PLAIN[how]} losses differ by {apart:.1%}: {ours}, {wanted}")

    def rate(step: Callable[[], float]) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return repeats * images / (time.perf_counter() - began)

    return Result(
        f"{how}/{name}",
        "images/s",
        in_turns({side: lambda step=step: rate(step) for side, step in sides.items()}, turns),
        equal=f"the loss to {apart:.1e} (at most {TOLERANCE[how]:g})",
        budget=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        details={"preset": settings.name, "images": images, "first_step_seconds": round(warm, 1)},
    )


def _side(settings: ModelSettings, name: str, side: str, images: int, device: torch.device) -> Callable[[], float]:
    """A step that gives its loss, which waits for the device. Weights, links and batch are the same for all sides."""
    torch.manual_seed(0)
    batch, decoder = batch_of(settings, name, images), decoder_class(name).build(settings).to(device).train()
    link = link_of(batch, decoder, settings).to(device)
    if side == "compiled":
        compile_module(decoder, device)
    step = training_step(decoder, settings, to_device(batch, device), link)

    def run() -> float:
        with arithmetic(side == "bf16", device):
            return float(step())

    return run
