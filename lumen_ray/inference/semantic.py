"""Semantic segmentation from instances: each pixel belongs to the class of its best-scored instance.

What any decoder of masks finds will do, so that the task needs no training of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumen_ray.structures import Boxes, Masks, Prediction


def class_regions(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Instances with masks per class of one image -> at most one region per class, which do not overlap.

    A region's score is that of its best instance, its box tight around it. Of classes that cover a pixel with the same
    score the first has it.
    """
    if not predictions:
        return []
    size = predictions[0].boxes.size
    best, owner = np.zeros(size, np.float32), np.full(size, -1)
    for number, prediction in enumerate(predictions):
        for mask, score in zip(prediction.masks.to_arrays(), prediction.scores, strict=True):
            won = mask & (score > best)
            best[won], owner[won] = score, number
    return [_region(prediction, owner == number) for number, prediction in enumerate(predictions)]


def _region(prediction: Prediction, mask: np.ndarray) -> Prediction:
    size = prediction.boxes.size
    if not mask.any():
        return Prediction(prediction.phrase, Boxes([], size), [], Masks([], size))
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = Boxes([[xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]], size)
    return Prediction(prediction.phrase, box, prediction.scores[:1], Masks.from_arrays(mask[None]))
