"""Tokens per second and share of the device's peak (MFU) of trunk, light decoders and whole step, compiled and eager.

Light decoders are those that read the trunk's dense features. Needs only torch and the model code: batches are made in
memory, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lumen_ray import config
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import Generalist, build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.precision import autocast_context
from lumen_ray.presets import model_path
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import PerceptionTargets
from lumen_ray.tasks import TASKS
from lumen_ray.train.blocks import compile_blocks
from lumen_ray.train.metrics import flops
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.tokenizer import LumenTokenizer

TOP = 5
TRUNK = ("vision", "llm", "dense")  # components of `flops.of_step`
PARTS = ("trunk", "decoders", "step")  # methods of `TimedModel`


def light_decoders(settings: ModelSettings) -> tuple[str, ...]:
    """The model's decoders that read the trunk's dense features."""
    return tuple(name for name in settings.decoder_names if DECODERS[name].reads == "dense")


def compiled_parts(settings: ModelSettings) -> tuple[str, ...]:
    """The parts that the compiled side compiles."""
    return ("vision", "llm", *light_decoders(settings))


@dataclass(frozen=True)
class Load:
    """Size of a batch: images, class prompts and captions per image, objects per prompt."""

    images: int = 16
    classes: int = 8
    captions: int = 2
    objects: int = 4


def make_tokenizer(settings: ModelSettings) -> LumenTokenizer:
    texts = [t for task in TASKS.values() for t in task.templates]
    return LumenTokenizer.train(texts, settings.vocab_size, settings.families)


def make_batch(settings: ModelSettings, tokenizer: LumenTokenizer, load: Load, seed: int = 0) -> TrainingBatch:
    """A training batch like the collator's, of random images, boxes and masks, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    side = settings.image_size
    branches, tasks = [], []
    for image in range(load.images):
        for number in range(load.classes):
            task = TASKS["segment" if number % 2 else "detect"]
            branches.append(Branch(image, task.prompt(f"object {number}", 0), route=task.routing_token))
            tasks.append(task.name)
        for _ in range(load.captions):
            words = "a picture of a small object beside a large one"
            branches.append(Branch(image, TASKS["caption"].prompt("", 0), response=words))
            tasks.append("caption")
    layout = build_layout(branches, load.images, tokenizer, settings.prompt_layout)
    prompts, count = load.images * load.classes, load.images * load.classes * load.objects
    low = torch.rand(prompts, load.objects, 2, generator=generator) * side * 0.6
    boxes = torch.cat([low, low + side * (0.1 + 0.3 * torch.rand(low.shape, generator=generator))], dim=-1)
    masks = (torch.rand(count, side // 4, side // 4, generator=generator) > 0.5).to(torch.uint8)
    targets = PerceptionTargets(
        boxes,
        torch.ones(prompts, load.objects, dtype=torch.bool),
        torch.zeros(prompts, load.objects, dtype=torch.bool),
        torch.arange(count).reshape(prompts, load.objects),
        masks,
        torch.zeros(prompts, load.objects, 3),
        torch.ones(prompts, dtype=torch.bool),
    )
    images = torch.randint(0, 256, (load.images, 3, side, side), generator=generator)
    return TrainingBatch(
        images=images.to(torch.uint8),
        extents=torch.full((load.images, 2), side),
        has_image=torch.ones(load.images, dtype=torch.bool),
        layout=layout,
        tasks=tasks,
        region_masks=torch.zeros(0, side, side, dtype=torch.uint8),
        region_images=torch.zeros(0, dtype=torch.int64),
        targets={"perception": targets},
        image_ids=[str(i) for i in range(load.images)],
    )


class TimedModel:
    """A model and its parts to time; `run` does one forward and backward pass of a part."""

    def __init__(
        self, settings: ModelSettings, vocab_size: int, batch: TrainingBatch, device: torch.device, compiled: bool
    ):
        self.model: Generalist = build_model(settings, vocab_size).to(device).train()
        if compiled:
            compile_blocks(self.model, compiled_parts(settings), device)
        self.light = light_decoders(settings)
        self.batch, self.device = batch.to(device), device
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, foreach=True)
        with torch.no_grad(), self._autocast():
            out = self.model.trunk(self.batch)
        self.dense = out.dense.detach().requires_grad_()
        self.links = {name: self._leaf(out.links[name]) for name in self.light}

    @staticmethod
    def _leaf(link: SuperLink) -> SuperLink:
        """The link with embeddings that gradients end at."""
        return SuperLink(link.decoder, link.embeddings.detach().requires_grad_(), link.image_index, link.parent)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast_context(self.precision == "bf16", self.device)

    def trunk(self) -> torch.Tensor:
        out = self.model.trunk(self.batch)
        total = out.lm_losses.float().sum() + out.dense.float().mean()
        for name in self.light:
            total = total + out.links[name].embeddings.mean()
        return total

    def decoders(self) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for name, link in self.links.items():
            decoder: Any = self.model.decoders[name]
            raw = decoder(link, self.dense)
            losses = decoder.loss(raw, self.batch.targets[decoder.family])
            total = total + sum(term.total / term.count.clamp_min(1.0) for term in losses.values())
        return total

    def step(self) -> torch.Tensor:
        losses = self.model(self.batch)
        return sum(term.total / term.count.clamp_min(1.0) for term in losses.values())

    def run(self, part: str) -> torch.Tensor:
        """Forward and backward pass of a part, for `step` with the optimizer. Returns the scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            total = getattr(self, part)()
        total.backward()
        if part == "step":
            self.optimizer.step()
        return total.detach()

    def seconds(self, part: str, repeats: int) -> float:
        """Mean time of a `run`, over `repeats` runs."""
        self._wait()
        began = time.perf_counter()
        for _ in range(repeats):
            self.run(part)
        self._wait()
        return (time.perf_counter() - began) / repeats

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tokens(self) -> int:
        """LLM tokens of the batch, without padding."""
        grid = self.model.trunk.vision.grid(*self.batch.images.shape[-2:])
        prefix = math.prod(grid) * int(self.batch.has_image.sum())
        return int((self.batch.layout.branch_ids >= 0).sum()) + prefix


def top_operations(work: Callable[[], Any], device: torch.device, count: int = TOP) -> list[dict[str, Any]]:
    """The operations that take longest, without those they call: name, milliseconds, share of all, calls."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as recorded:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)

    def self_time(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = sorted(recorded.key_averages(), key=self_time, reverse=True)
    # on a GPU the same time is reported twice: for kernels, and for the operations that started them
    events = [e for e in events if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(map(self_time, events)) or 1.0
    return [
        {
            "name": e.key[:100],
            "ms": round(self_time(e) / 1e3, 3),
            "share": round(self_time(e) / total, 4),
            "calls": e.count,
        }
        for e in events[:count]
    ]


def check(preset: str) -> None:
    """Raises `UserError` for an unknown preset, or one without light decoders."""
    settings = config.load(ModelSettings, model_path(preset))
    if not light_decoders(settings):
        raise UserError(
            f"preset '{preset}' has no decoder that reads the trunk's dense features; give another, such as small",
            "no_decoder",
        )


def bench(
    preset: str = "small",
    *,
    device: str = "cuda",
    load: Load | None = None,
    repeats: int = 10,
    warm: int = 3,
    turns: int = 5,
    parts: tuple[str, ...] = PARTS,
) -> Iterator[Result]:
    """One result per part, compiled against eager; a single skipped result if there is no such device."""
    check(preset)
    if device == "cuda" and not torch.cuda.is_available():
        yield Result("gpu", "", {}, skipped="there is no CUDA device here; run it on a GPU machine")
        return
    load, place = load or Load(), torch.device(device)
    settings = config.load(ModelSettings, model_path(preset))
    tokenizer = make_tokenizer(settings)
    batch = make_batch(settings, tokenizer, load)
    sides = {
        name: TimedModel(settings, len(tokenizer), batch, place, compiled)
        for name, compiled in (("compiled", True), ("eager", False))
    }
    for part in parts:
        yield _measure(part, sides, settings.name, place, repeats, warm, turns)


def _measure(
    part: str, sides: dict[str, TimedModel], preset: str, device: torch.device, repeats: int, warm: int, turns: int
) -> Result:
    eager = sides["eager"]
    difference = _warm_up(sides, part, warm)
    tokens, peak = eager.tokens(), flops.peak(device, eager.precision)
    work = flops.of_step(eager.model, [eager.batch])
    components = {"trunk": TRUNK, "decoders": eager.light, "step": tuple(work)}[part]
    count = sum(work[name] for name in components)

    def rate(side: TimedModel) -> float:
        return tokens / side.seconds(part, repeats)

    rates = in_turns({name: partial(rate, side) for name, side in sides.items()}, turns)
    details = {
        "preset": preset,
        "precision": eager.precision,
        "tokens": tokens,
        "tflops": count / 1e12,
        "mfu": {name: statistics.median(r) / tokens * count / peak if peak else None for name, r in rates.items()},
        "top": {name: top_operations(partial(side.run, part), device) for name, side in sides.items()},
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Result(f"gpu/{part}", "tokens/s", rates, None, f"the loss to {difference:.1%}", where, details)


def _warm_up(sides: dict[str, TimedModel], part: str, warm: int) -> float:
    """Compiles; returns the relative difference of the sides' scalars. Raises `SidesDiffer` from 5 % on, which bf16
    rounding does not reach."""
    values = [[float(side.run(part)) for _ in range(max(1, warm))][0] for side in sides.values()]
    difference = abs(values[0] - values[1]) / max(1e-6, abs(values[1]))
    if not difference < 0.05:
        raise SidesDiffer(f"compiled and eager {part} differ by {difference:.1%}: {values}")
    return difference
