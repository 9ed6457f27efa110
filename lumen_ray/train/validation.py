"""Validation during training: scores the weights that would be exported, and keeps the best of them.

Rank 0 scores, and the other ranks wait: the layers of a sharded model are gathered by all ranks together, so ranks that
answer different requests could not run it. Rank 0 therefore loads the whole model beside its shard.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lumen_ray.data import files, urls
from lumen_ray.meta_init import on_meta
from lumen_ray.model.build import WEIGHTS, LoadedModel, ModelMeta, build_model, save_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.precision import Dtype
from lumen_ray.train import parallel
from lumen_ray.train.run.start import StartPoint

BEST = "model-best"
#: of `RUN/validation`, the report of the newest validation
REPORT = "validation"


@dataclass(frozen=True)
class Scores:
    """What a validation measured: metrics by name, and the one that the best model is chosen by, where it has a
    value."""

    metrics: Mapping[str, float]
    chosen: str
    lower_is_better: bool = False

    @property
    def value(self) -> float | None:
        return self.metrics.get(self.chosen)

    def beats(self, best: float | None) -> bool:
        """Whether these scores are better than the best so far, None if there is none."""
        if self.value is None or best is None:
            return self.value is not None
        return self.value < best if self.lower_is_better else self.value > best


class Validator(Protocol):
    """Scores a model on a held-out split; plain values, so that Ray can ship it. `evaluate.during_training` has the one
    of `lumen-ray train`."""

    @property
    def every(self) -> int:
        """Steps between validations."""

    def check(self, settings: ModelSettings, meta: ModelMeta) -> None:
        """Raises `UserError`, before a run starts, if a model with these settings cannot be scored."""

    def score(self, loaded: LoadedModel, device: torch.device, output: Path) -> Scores:
        """Scores a model whose weights are in `loaded.weights`; writes a report into `output`."""


@dataclass
class Validation:
    """The validations of one rank's run."""

    validator: Validator
    run: Path  # the folder in which this rank writes files
    start: StartPoint
    device: torch.device
    half: bool = False  # whether the model computes in bf16
    _best: float | None = field(init=False, default=None)
    _waiting: Any = field(init=False)

    def __post_init__(self) -> None:
        self._waiting = parallel.cpu_group(parallel.LONGEST_WAIT)

    def begin(self, step: int, location: urls.Location) -> None:
        """Takes up the best model of the run folder at `location`, a path or URL, from which a run goes on at `step`;
        that of an earlier run, with `step` 0, is forgotten."""
        if parallel.rank() > 0:
            return
        if step:
            self._best = best_of(location)
        else:
            shutil.rmtree(self.run / BEST, ignore_errors=True)

    def is_due(self, done: int, total: int) -> bool:
        """Whether to validate after `done` of `total` steps."""
        return done == total or done % self.validator.every == 0

    def measure(self, state: dict[str, Tensor], meta: ModelMeta) -> dict[str, float]:
        """Validates the weights `state`, which rank 0 has, and keeps them in `RUN/model-best` if they are the best so
        far; returns the values to log. A collective.

        `meta`: of the model, with the number of steps done.
        """
        values: dict[str, float] = {}
        failure = None
        if parallel.rank() == 0:
            try:
                values = self._measure(state, meta)
            except Exception as error:  # raised below, after the other ranks have got it
                failure = error
        parallel.raise_together(failure, self._waiting)
        return values

    def _measure(self, state: dict[str, Tensor], meta: ModelMeta) -> dict[str, float]:
        began = time.perf_counter()
        settings, tokenizer = self.start.settings, self.start.tokenizer
        with on_meta():
            model = build_model(settings, len(tokenizer)).eval()
        dtype: Dtype = "bfloat16" if self.half else "float32"
        loaded = LoadedModel(model, settings, tokenizer, meta, f"step-{meta.steps}", {}, dtype, state)
        scores = self.validator.score(loaded, self.device, self.run / REPORT)
        if is_best := scores.beats(self._best):
            self._best = scores.value
            found = {"metric": scores.chosen, "value": scores.value, "step": meta.steps}
            save_model(self.run / BEST, state, settings, tokenizer, replace(meta, validation=found))
        values = {f"validation/{name}": round(value, 5) for name, value in scores.metrics.items()}
        return values | {"validation/best": float(is_best), "validation/seconds": round(time.perf_counter() - began, 2)}


def best_of(run: urls.Location) -> float | None:
    """The value of the best model's metric; None if there is no complete model yet."""
    folder = urls.join(run, BEST)
    if not all(files.is_file(urls.join(folder, name)) for name in ("meta.json", WEIGHTS)):
        return None
    return json.loads(files.read_text(urls.join(folder, "meta.json")))["validation"].get("value")
