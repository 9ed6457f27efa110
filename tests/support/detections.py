"""Rows and answers with given boxes, of images of 40 x 40 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.structures import Boxes, Masks, Prediction

SIZE = (40, 40)


def row(truth: Sequence[Sequence[float]], phrase: str = "cat") -> dict[str, Any]:
    """A shard row with true boxes of a class."""
    instances = [{"phrase": phrase, "box": box, "crowd": False, "mask": None} for box in truth]
    return {"classes": [phrase], "instances": instances, "height": SIZE[0], "width": SIZE[1]}


def answer(
    found: Sequence[tuple[Sequence[float], float]],
    phrase: str = "cat",
    task: str = "detect",
    masks: Masks | None = None,
) -> Answer:
    """An answer with predicted boxes of a class and their scores."""
    corners = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
    scores = np.array([score for _, score in found], np.float32)
    return Answer(task, SIZE, [Prediction(phrase, Boxes(corners, SIZE), scores, masks)])
