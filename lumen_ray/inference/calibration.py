"""Calibrated scores: a score becomes the probability that the instance is right, as far as a labelled split tells.

Platt scaling (temperature and shift) of a decoder's scores by task, with a shift per class where the split has many of
it: sigmoid(slope * logit(score) + shift). `evaluate.calibrate` fits the curves; a model folder keeps them in
`meta.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from scipy.special import expit, logit

from lumen_ray.errors import UserError
from lumen_ray.tasks import get_task

#: Scores are clamped to this distance from 0 and 1 before their logit is taken.
EDGE = 1e-6


def log_odds(scores: np.ndarray) -> np.ndarray:
    """Logits, float64, of scores in 0..1."""
    return logit(np.clip(np.asarray(scores, float), EDGE, 1 - EDGE))


@dataclass(frozen=True)
class Curve:
    """The curve of a task: `slope` (the inverse of the temperature, above 0), `shift`, and other shifts by class.
    `decoder`: whose scores these are."""

    slope: float = 1.0
    shift: float = 0.0
    classes: Mapping[str, float] = field(default_factory=dict)
    decoder: str = ""

    def __call__(self, scores: np.ndarray, phrase: str) -> np.ndarray:
        """Calibrated scores, float32 [N], of those of a phrase."""
        return expit(self.slope * log_odds(scores) + self._shift(phrase)).astype(np.float32)

    def raw(self, threshold: float, phrase: str) -> float:
        """A score below all whose calibrated score is `threshold` or more."""
        least = threshold * (1 - 1e-6)  # calibrated scores are rounded to float32
        if least <= EDGE:
            return 0.0
        exact = float(expit((log_odds(np.array(least)) - self._shift(phrase)) / self.slope))
        return max(0.0, exact - EDGE)

    def _shift(self, phrase: str) -> float:
        return self.classes.get(phrase, self.shift)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The curves of a model by task. Tasks without one keep their scores."""

    curves: Mapping[str, Curve]

    def curve(self, task: str, decoder: str) -> Curve | None:
        """The curve of a decoder for a task, or for the one that its answers are computed from."""
        found = self.curves.get((get_task(task).derived_from or task) if task else task)
        return found if found is not None and found.decoder == decoder else None

    def to_dict(self) -> dict[str, Any]:
        """JSON types, as in `meta.json`."""
        return {
            task: {
                "decoder": curve.decoder,
                "slope": curve.slope,
                "shift": curve.shift,
                "classes": dict(curve.classes),
            }
            for task, curve in self.curves.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises `UserError` (`damaged_model`) for anything but what `to_dict` gives."""
        try:
            curves = {get_task(task).name: Curve(**values) for task, values in data.items()}
            ok = all(
                curve.slope > 0 and np.isfinite([curve.slope, curve.shift, *curve.classes.values()]).all()
                for curve in curves.values()
            )
        except (TypeError, AttributeError, ValueError):
            ok = False
        if not ok:
            raise UserError(
                "the calibration in the model's meta.json is damaged; run 'lumen-ray calibrate' again", "damaged_model"
            )
        return cls(curves)
