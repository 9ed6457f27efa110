"""The time that each stage of a label job takes, with where the figure comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

Source = Literal["measured", "computed", "assumed"]
#: stages that run beside each other while images are labelled, in the order of an image's way
STAGES = ("listing", "reading", "decoding", "model", "publishing", "driver")


@dataclass(frozen=True)
class Stage:
    """Seconds of a stage as samples, one or more. `note`: how they were made, for the report."""

    samples: tuple[float, ...]
    source: Source
    note: str = ""

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples))

    def scaled(self, factor: float, note: str = "") -> Stage:
        return replace(self, samples=tuple(s * factor for s in self.samples), note=note or self.note)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each stage.

    listing: of the lister per image. reading: of a reading thread per image, waiting for a disk or a store.
    decoding: of one core per image. model: of a batch of `batch_size` images, on a GPU; on a CPU, seconds of one core.
    publishing: of one core per fragment. driver, worker: CPU seconds of the driver, and of the cluster's other
    processes, per task. start: from the start of an actor to its first task. finishing: of the driver per fragment,
    once all are labelled, for counting and gathering errors.
    read_at_once: images that an actor reads at the same time. request_s: an answer of the output's store, which an
    actor waits for three times per fragment. model_cores: cores that an actor uses while the model runs. ray_start_s:
    of the command until it asks for actors.
    """

    listing: Stage
    reading: Stage
    decoding: Stage
    model: Stage
    publishing: Stage
    driver: Stage
    worker: Stage
    start: Stage
    finishing: Stage
    batch_size: int = 8
    read_at_once: int = 1
    request_s: float = 0.0
    model_cores: float = 1.0
    ray_start_s: float = 0.0

    @property
    def stages(self) -> dict[str, Stage]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Stage)}

    def faster(self, stage: str, factor: float) -> StageTimes:
        """With one stage taking `1 / factor` of its time."""
        changes: dict[str, object] = {stage: getattr(self, stage).scaled(1 / factor)}
        if stage == "publishing":
            changes["request_s"] = self.request_s / factor
        return replace(self, **changes)  # type: ignore[arg-type]


class Draws:
    """Sums of `number` random samples of a stage, drawn ahead of time and repeated after `kept` of them."""

    def __init__(self, stage: Stage, number: int, rng: np.random.Generator, kept: int = 1 << 12):
        samples = np.asarray(stage.samples, dtype=float)
        drawn = rng.choice(samples, (kept, number)).sum(1) if len(samples) > 1 else np.full(kept, samples[0] * number)
        self._values: list[float] = drawn.tolist()
        self._next = 0

    def draw(self) -> float:
        value = self._values[self._next]
        self._next = (self._next + 1) % len(self._values)
        return value
