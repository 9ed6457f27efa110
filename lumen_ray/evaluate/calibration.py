"""Do scores mean what they say: of the instances with a score of 0.8, are four in five right?

Expected calibration error (Guo et al., arXiv 1706.04599, eq. 3) of detections, as in Kuppers et al. (arXiv 2004.13546):
an instance is right if it is matched to an object of its phrase at IoU 0.5 that no better one is matched to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lumen_ray.answer import Answer
from lumen_ray.data.files import write_atomically
from lumen_ray.evaluate.concepts import overlaps, true_instances
from lumen_ray.evaluate.grounding import matched
from lumen_ray.evaluate.scored import Row
from lumen_ray.structures import Prediction

NUM_BINS = 15
#: Instances with lower scores are left out: there are any number of them, none of which anybody looks at.
LEAST_SCORE = 0.05


@dataclass(frozen=True)
class Reliability:
    """Instances by score: `score` and `right` float64 [bins], the mean score and the share that is right (0 in empty
    bins), and `number` int64 [bins] of them. Bins are of equal width over 0..1."""

    score: np.ndarray
    right: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, hits: np.ndarray, bins: int = NUM_BINS) -> Reliability:
        """scores float [N] in 0..1, hits bool [N]."""
        place = np.clip((scores * bins).astype(int), 0, bins - 1)
        number = np.bincount(place, minlength=bins)
        least = np.maximum(number, 1)
        score = np.bincount(place, scores, minlength=bins) / least
        return cls(score, np.bincount(place, hits, minlength=bins) / least, number)

    @property
    def error(self) -> float | None:
        """The expected calibration error; None without instances."""
        total = self.number.sum()
        return float((self.number * np.abs(self.score - self.right)).sum() / total) if total else None


class CalibrationEvaluator:
    """Collects the scores of instances and whether they are right; `reset` / `process` / `evaluate`."""

    def __init__(self, kind: Literal["bbox", "segm"]):
        self.kind = kind
        self.reset()

    def reset(self) -> None:
        """Forgets all instances."""
        self._scores: list[np.ndarray] = []
        self._hits: list[np.ndarray] = []
        self._phrases: list[str] = []

    def process(self, row: Row, answer: Answer) -> None:
        """Adds one image: its row, and the answer to a request for classes. Phrases of which not all instances are
        known are left out."""
        for prediction in answer.predictions:
            truth = true_instances(row, prediction.phrase, self.kind)
            if truth is not None:
                self.add(prediction, truth)

    def add(self, prediction: Prediction, truth: list[Any]) -> None:
        """Adds the prediction of a phrase, and its objects as of `true_instances`."""
        found = prediction.above(LEAST_SCORE)
        self._scores.append(np.asarray(found.scores, float))
        self._hits.append(matched(found.scores, overlaps(found, truth, self.kind)))
        self._phrases += [prediction.phrase] * len(found)

    @property
    def instances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores float [N], whether right bool [N], phrases [N]) of all instances."""
        scores = np.concatenate([np.zeros(0), *self._scores])
        hits = np.concatenate([np.zeros(0, bool), *self._hits])
        return scores, hits, np.array(self._phrases, dtype=object)

    @property
    def reliability(self) -> Reliability:
        """Of all instances."""
        scores, hits, _ = self.instances
        return Reliability.of(scores, hits)

    def evaluate(self) -> dict[str, float | None]:
        """``ECE``, None without instances."""
        return {"ECE": self.reliability.error}


_SIDE, _MARGIN = 300, 44


def draw_reliability(diagrams: Mapping[str, Reliability], path: Path) -> None:
    """Draws reliability diagrams by title, side by side, as a PNG: the share of right instances (bars), the mean score
    (marks) and the number of instances of each bin; bars of calibrated scores reach up to the diagonal."""
    width = _SIDE + 2 * _MARGIN
    picture = Image.new("RGB", (width * max(1, len(diagrams)), width), "white")
    for number, (title, diagram) in enumerate(diagrams.items()):
        _draw(ImageDraw.Draw(picture), number * width + _MARGIN, title, diagram)
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))


def _draw(draw: ImageDraw.ImageDraw, left: int, title: str, diagram: Reliability) -> None:
    font = ImageFont.load_default(12)
    top, bottom = _MARGIN, _MARGIN + _SIDE
    bins = len(diagram.number)
    for tick in range(5):
        place = round(tick / 4 * _SIDE)
        draw.line((left, bottom - place, left + _SIDE, bottom - place), fill="#e4e4e4")
        draw.text((left - 6, bottom - place), f"{tick / 4:g}", fill="black", font=font, anchor="rm")
        draw.text((left + place, bottom + 5), f"{tick / 4:g}", fill="black", font=font, anchor="ma")
    for n, (score, right, number) in enumerate(zip(diagram.score, diagram.right, diagram.number, strict=True)):
        if not number:
            continue
        x1, x2 = (left + round(edge / bins * _SIDE) for edge in (n, n + 1))
        draw.rectangle((x1, bottom - round(right * _SIDE), x2 - 1, bottom), fill="#6d9eeb", outline="#3c6db0")
        shown = str(number) if number < 1000 else f"{number / 1000:.0f}k"
        draw.text(((x1 + x2) // 2, top + 3), shown, fill="black", font=ImageFont.load_default(8), anchor="ma")
        y = bottom - round(score * _SIDE)
        draw.line((x1, y, x2 - 1, y), fill="#cc3333", width=2)
    draw.line((left, bottom, left + _SIDE, top), fill="#888888")
    draw.rectangle((left, top, left + _SIDE, bottom), outline="black")
    error = "-" if diagram.error is None else f"{diagram.error:.3f}"
    heading = f"{title}: {diagram.number.sum():,} instances, ECE {error}"
    draw.text((left, top - 8), heading, fill="black", font=font, anchor="ls")
    legend = "score; number of instances; bars: right at IoU 0.5; red: mean score"
    draw.text((left + _SIDE // 2, bottom + 24), legend, fill="black", font=ImageFont.load_default(10), anchor="ma")
