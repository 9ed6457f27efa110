"""Pictures that a model makes for the rows of a split, judged by its own detector (see `generation`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lumen_ray.data.images import decode
from lumen_ray.evaluate.generation import Detector, described, found_in, score_edits, score_generated
from lumen_ray.inference.request import Request, make_request
from lumen_ray.structures import Answer, SampleSettings

Row = dict[str, Any]
Asks = list[tuple[Request, Callable[[Answer], None]]]
_JUDGED_AT_ONCE = 8


def detector_of(engine: Any, classes: Sequence[str]) -> Detector:
    """The engine's own answers to `detect` with all classes."""
    request = make_request("detect", classes=list(classes))

    def detect(pictures: Sequence[np.ndarray]) -> list[Mapping[str, Any]]:
        found = []
        for start in range(0, len(pictures), _JUDGED_AT_ONCE):
            some = pictures[start : start + _JUDGED_AT_ONCE]
            found += [found_in(answers[0]) for answers in engine.run(some, [[request]] * len(some))]
        return found

    return detect


@dataclass
class PicturesEvaluator:
    """Collects what was made; `evaluate` judges it. The seed of a row's picture is its number in the split."""

    described: list[dict[str, int]] = field(default_factory=list)
    generated: list[np.ndarray] = field(default_factory=list)
    before: list[np.ndarray] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)
    edited: list[np.ndarray] = field(default_factory=list)

    def generate_asks(self, row: Row, number: int) -> Asks:
        """The row's first caption as a description, where it is one of a scene: others cannot be judged by counting."""
        for message in row["messages"]:
            if message["task"] == "caption" and (objects := described(message["turns"][-1]["content"])):
                text = message["turns"][-1]["content"]
                request = make_request("generate", text=text, sample=SampleSettings(seed=number))
                return [(request, lambda answer: self._made(objects, answer))]
        return []

    def edit_asks(self, row: Row, number: int) -> Asks:
        """The row's instructions; it must have the edited picture."""
        if row["target_image"] is None:
            return []
        before, wanted = decode(row["image"]), decode(row["target_image"])
        return [
            (
                make_request("edit", text=message["turns"][0]["content"], sample=SampleSettings(seed=number)),
                lambda answer: self._changed(before, wanted, answer),
            )
            for message in row["messages"]
            if message["task"] == "edit"
        ]

    def _made(self, objects: dict[str, int], answer: Answer) -> None:
        self.described.append(objects)
        self.generated += answer.images

    def _changed(self, before: np.ndarray, wanted: np.ndarray, answer: Answer) -> None:
        self.before.append(before)
        self.wanted.append(wanted)
        self.edited += answer.images

    def evaluate(self, detect: Detector) -> dict[str, float | None]:
        """The metrics of `score_generated` and `score_edits`, of what there is."""
        metrics: dict[str, float | None] = {}
        if self.generated:
            metrics |= score_generated(self.described, self.generated, detect)
        if self.edited:
            metrics |= score_edits(self.before, self.wanted, self.edited, detect)
        return metrics
