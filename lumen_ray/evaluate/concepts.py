"""Finding everything that a phrase names, or saying that nothing is there: the measures of SAM 3's benchmark.

SAM 3 (arXiv 2511.16719, sec. 5 and its evaluation code) scores pairs of an image and a phrase, at one decision
threshold, since that is how labels are used:

- IL_MCC, is the phrase's object in the image at all: Matthews correlation coefficient over all pairs;
- positive micro F1, are its instances found: from the counts of all pairs with objects, at IoU 0.50:0.95;
- positive macro F1: the mean F1 of pairs with objects and predictions;
- cgF1, classification-gated F1: the product of IL_MCC and positive micro F1.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from lumen_ray.answer import Answer
from lumen_ray.evaluate.scored import Row
from lumen_ray.structures import Boxes, Prediction

#: The benchmark's decision threshold, and its IoU thresholds.
CONCEPT_THRESHOLD = 0.5
IOUS = np.linspace(0.5, 0.95, 10)


def true_instances(row: Row, phrase: str, kind: Literal["bbox", "segm"]) -> list[Any] | None:
    """The instances of a class in a row, as pycocotools takes them: boxes xywh or RLEs. None where they are not known:
    the class is not annotated exhaustively, there is a crowd, or a mask is missing."""
    if phrase not in row["classes"]:
        return None
    found = [instance for instance in row["instances"] if instance["phrase"] == phrase]
    if any(instance["crowd"] for instance in found):
        return None
    if kind == "segm":
        masks = [instance["mask"] for instance in found]
        return None if any(mask is None for mask in masks) else masks
    boxes = np.asarray([instance["box"] for instance in found], np.float32).reshape(-1, 4)
    return list(Boxes(boxes, (row["height"], row["width"])).to_xywh().astype(float))


def overlaps(prediction: Prediction, truth: list[Any], kind: Literal["bbox", "segm"]) -> np.ndarray:
    """IoU of predictions with true instances (see `true_instances`): float64 [P, T]."""
    if not len(prediction) or not truth:
        return np.zeros((len(prediction), len(truth)))
    if kind == "segm":
        assert prediction.masks is not None, "answers of task segment have masks"
        found: Any = list(prediction.masks.rles)
    else:
        found = list(prediction.boxes.to_xywh().astype(float))
    return np.asarray(coco_mask.iou(found, truth, [0] * len(truth)))


class ConceptEvaluator:
    """The measures of the module's docstring; `reset` / `process` / `evaluate`."""

    def __init__(self, kind: Literal["bbox", "segm"], threshold: float = CONCEPT_THRESHOLD):
        """`kind`: IoU of boxes or of masks; `threshold`: the score from which on an instance counts."""
        self.kind = kind
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forgets all pairs."""
        self._present: list[bool] = []  # per pair: the object is there
        self._claimed: list[bool] = []  # an instance of it is predicted
        self._matched = np.zeros(len(IOUS), int)  # instances of pairs with objects
        self._predicted = self._true = 0
        self._f1: list[np.ndarray] = []  # per pair with objects and predictions

    def process(self, row: Row, answer: Answer) -> None:
        """Adds the pairs of one image: its row, and the answer to a request for classes. Pairs of which not all
        instances are known are left out."""
        for prediction in answer.predictions:
            truth = true_instances(row, prediction.phrase, self.kind)
            if truth is None:
                continue
            claimed = prediction.above(self.threshold)
            self._present.append(bool(truth))
            self._claimed.append(len(claimed) > 0)
            if not truth:
                continue
            iou = overlaps(claimed, truth, self.kind)
            best = iou[linear_sum_assignment(-iou)]
            matched = (best[:, None] >= IOUS).sum(0)
            self._matched += matched
            self._predicted += len(claimed)
            self._true += len(truth)
            if len(claimed):
                self._f1.append(2 * matched / (len(claimed) + len(truth)))

    def evaluate(self) -> dict[str, float | None]:
        """``IL_MCC``, ``pmF1`` (positive micro), ``pMF1`` (positive macro) and ``cgF1``, None where the split has
        nothing to measure them by. IL_MCC is undefined, and so None, where all or none of the pairs have objects; it is
        0 where all or none have predictions."""
        mcc = _matthews(np.array(self._present, bool), np.array(self._claimed, bool))
        micro = None
        if self._true:
            micro = float((2 * self._matched / (self._predicted + self._true)).mean())
        return {
            "IL_MCC": mcc,
            "pmF1": micro,
            "pMF1": float(np.mean(self._f1)) if self._f1 else None,
            "cgF1": None if mcc is None or micro is None else mcc * micro,
        }


def _matthews(truth: np.ndarray, claims: np.ndarray) -> float | None:
    """Matthews correlation coefficient of two arrays bool [N]."""
    if truth.all() or not truth.any():
        return None
    if claims.all() or not claims.any():
        return 0.0
    return float(np.corrcoef(truth, claims)[0, 1])  # of two binary variables they are the same
