"""Semantic segmentation from instances: each pixel belongs to the class of its best-scored instance.

Works on the masks of any decoder, so the task needs no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lumen_ray.structures import Boxes, Masks, Prediction


def class_regions(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Instances with masks per class of one image -> at most one region per class; regions do not overlap.

    A region has the score of its best instance and a tight box. Of classes with the same score at a pixel the first
    wins.
    """
    if not predictions:
        return []
    size = predictions[0].boxes.size
    best, owner = np.zeros(size, np.float32), np.full(size, -1)
    for number, prediction in enumerate(predictions):
        assert prediction.masks is not None, "semantic segmentation needs masks"
        for mask, score in zip(prediction.masks.to_arrays(), prediction.scores, strict=True):
            won = mask & (score > best)
            best[won], owner[won] = score, number
    return [_region(prediction, owner == number) for number, prediction in enumerate(predictions)]


def _region(prediction: Prediction, mask: np.ndarray) -> Prediction:
    size = prediction.boxes.size
    if not mask.any():
        return Prediction(prediction.phrase, Boxes(np.zeros((0, 4)), size), np.zeros(0), Masks([], size))
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = Boxes(np.array([[xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]]), size)
    return replace(prediction[:1], boxes=box, masks=Masks.from_arrays(mask[None]))
