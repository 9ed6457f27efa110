"""Scores of tasks that locate the objects of a phrase: referring expressions, grounded phrases, counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.structures import Boxes, Prediction

#: An instance counts as claimed from this score on, where a task has to decide (absence, counting, F1).
DECISION_THRESHOLD = 0.3
HIT_IOU = 0.5


def row_boxes(row: dict[str, Any], indices: Sequence[int]) -> Boxes:
    """The boxes of `row`'s instances at `indices`."""
    boxes = [row["instances"][i]["box"] for i in indices]
    return Boxes(np.asarray(boxes, np.float32).reshape(-1, 4), (row["height"], row["width"]))


def matched(scores: np.ndarray, overlaps: np.ndarray, iou: float = HIT_IOU) -> np.ndarray:
    """Which predictions are matched to distinct true objects at `iou` or more, best `scores` first: bool [P].
    `overlaps`: their IoU [P, T], which is changed."""
    hits = np.zeros(len(scores), bool)
    for i in np.argsort(-scores, kind="stable"):
        if overlaps.shape[1] and overlaps[i].max() >= iou:
            overlaps[:, overlaps[i].argmax()] = -1
            hits[i] = True
    return hits


def match_count(prediction: Prediction, truth: Boxes, iou: float = HIT_IOU) -> int:
    """Number of predictions matched to distinct true boxes at `iou` or more."""
    return int(matched(prediction.scores, prediction.boxes.iou(truth), iou).sum())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


class ReferEvaluator:
    """Referring expressions: one object each, several (a hit on any of them counts) or none.

    ``refer_p50``: share of expressions with a target whose best-scored box overlaps it by IoU 0.5.
    ``refer_no_target_accuracy``: share of expressions without a target for which no instance reaches the decision
    threshold; ``refer_target_accuracy``: share of the others for which one does (without it, never finding anything
    would look perfect).
    """

    def __init__(self, threshold: float = DECISION_THRESHOLD):
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forgets all expressions."""
        self._hits = self._claimed = self._targets = self._absent = self._rejected = 0
        self._ious: list[float] = []

    def process(self, row: dict[str, Any], instances: Sequence[int], answer: Answer) -> None:
        """Adds one expression: the `instances` of `row` that it means (empty: none) and the answer."""
        prediction = answer.predictions[0]
        claims = bool((prediction.scores >= self.threshold).any())
        if not len(instances):
            self._absent += 1
            self._rejected += not claims
            return
        self._targets += 1
        self._claimed += claims
        best = 0.0
        if len(prediction):
            top = prediction[[int(prediction.scores.argmax())]]
            best = float(top.boxes.iou(row_boxes(row, instances)).max())
        self._ious.append(best)
        self._hits += best >= HIT_IOU

    def evaluate(self) -> dict[str, Any]:
        """Metric -> value in 0..1, or None where the split has no such expression."""
        return {
            "refer_p50": _ratio(self._hits, self._targets),
            "refer_mean_iou": float(np.mean(self._ious)) if self._ious else None,
            "refer_target_accuracy": _ratio(self._claimed, self._targets),
            "refer_no_target_accuracy": _ratio(self._rejected, self._absent),
            "refer_expressions": self._targets + self._absent,
        }


class GroundEvaluator:
    """Phrases of a sentence, each with any number of objects.

    ``ground_p50``: share of phrases with objects whose best-scored box hits one of them (IoU 0.5).
    ``ground_recall50``, ``ground_precision50``, ``ground_f1``: over boxes, among predictions above the threshold.
    """

    def __init__(self, threshold: float = DECISION_THRESHOLD):
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forgets all phrases."""
        self._phrases = self._with_objects = self._hits = 0
        self._true = self._claimed = self._matched = 0

    def process(self, row: dict[str, Any], instances: Sequence[int], prediction: Prediction) -> None:
        """Adds one phrase: the `instances` of `row` that it means and its prediction."""
        truth = row_boxes(row, instances)
        claimed = prediction.above(self.threshold)
        self._phrases += 1
        self._true += len(truth)
        self._claimed += len(claimed)
        self._matched += match_count(claimed, truth)
        if len(truth):
            self._with_objects += 1
            if len(prediction):
                top = prediction[[int(prediction.scores.argmax())]]
                self._hits += bool(top.boxes.iou(truth).max() >= HIT_IOU)

    def evaluate(self) -> dict[str, Any]:
        """Metric -> value in 0..1, or None where the split has no grounded phrase."""
        return {
            "ground_p50": _ratio(self._hits, self._with_objects),
            "ground_recall50": _ratio(self._matched, self._true),
            "ground_precision50": _ratio(self._matched, self._claimed),
            "ground_f1": _ratio(2 * self._matched, self._true + self._claimed),
            "ground_phrases": self._phrases,
        }


class CountEvaluator:
    """Counting per class and image, at the decision threshold.

    ``count_error`` (mean absolute) and ``count_accuracy`` (exact) are over classes present in the image, since most
    classes are absent and a zero is easy; absent ones are in ``count_absent_accuracy``. Classes with a crowd are left
    out: their true number is unknown.
    """

    def __init__(self, threshold: float = DECISION_THRESHOLD):
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._errors: list[int] = []
        self._absent: list[bool] = []

    def process(self, row: dict[str, Any], answer: Answer) -> None:
        """Adds one image: its row and the answer to a `count` request."""
        annotated = set(row["classes"])
        number = Counter(i["phrase"] for i in row["instances"])
        crowded = {i["phrase"] for i in row["instances"] if i["crowd"]}
        for prediction in answer.predictions:
            name = prediction.phrase
            if name not in annotated or name in crowded:
                continue
            found = len(prediction.above(self.threshold))
            if number[name]:
                self._errors.append(abs(found - number[name]))
            else:
                self._absent.append(found == 0)

    def evaluate(self) -> dict[str, Any]:
        """Metric -> value; None where the split has nothing to count."""
        errors = np.asarray(self._errors)
        return {
            "count_error": float(errors.mean()) if errors.size else None,
            "count_accuracy": float((errors == 0).mean()) if errors.size else None,
            "count_absent_accuracy": float(np.mean(self._absent)) if self._absent else None,
        }
