"""Scores of the LLM's text: answers, captions, region captions, and the routing tokens it chooses in free chat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumen_ray.evaluate.scene_captions import (
    caption_attribute_chance,
    caption_attributes,
    caption_score,
    vqa_answer_space,
    vqa_chance,
)
from lumen_ray.tasks import get_task


def normalise(text: str) -> str:
    """Lowercase, single blanks, no final punctuation: ``" Two  circles ." -> "two circles"``."""
    return " ".join(text.lower().split()).rstrip(" .!?,;")


class VqaEvaluator:
    """Exact match of short answers.

    ``vqa_chance`` is the accuracy of drawing from each question's possible answers, ``vqa_majority`` that of the
    commonest answer to each exact question; both are None unless all questions are those of scenes, whose answers can
    be enumerated.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all questions."""
        self._pairs: list[tuple[str, str]] = []
        self._correct: list[bool] = []

    def process(self, question: str, truth: str, answer: str | None) -> None:
        """Adds one question with its true answer and the model's."""
        self._pairs.append((question, truth))
        self._correct.append(normalise(answer or "") == normalise(truth))

    def evaluate(self) -> dict[str, Any]:
        """Metric -> value in 0..1, or None."""
        chance: Mapping[str, float | None] = {"uniform": None, "majority": None}
        if self._pairs and all(vqa_answer_space(question) for question, _ in self._pairs):
            chance = vqa_chance(self._pairs)
        return {
            "vqa_accuracy": float(np.mean(self._correct)) if self._correct else None,
            "vqa_chance": chance["uniform"],
            "vqa_majority": chance["majority"],
            "vqa_questions": len(self._pairs),
        }


class CaptionEvaluator:
    """F1 over the (colour, shape, count) items a caption states.

    ``caption_chance`` is the score of another image's caption. Captions that state no such item (photographs) are not
    scored.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all captions."""
        self._truths: list[str] = []
        self._scores: list[float] = []

    def process(self, truth: str, answer: str | None) -> None:
        """Adds one image's true caption and the model's."""
        if caption_attributes(truth):
            self._truths.append(truth)
            self._scores.append(caption_score(answer or "", truth))

    def evaluate(self) -> dict[str, Any]:
        """Metric -> value in 0..1, or None."""
        return {
            "caption_attributes": float(np.mean(self._scores)) if self._scores else None,
            "caption_chance": caption_attribute_chance(self._truths) if len(self._truths) > 1 else None,
            "captions": len(self._truths),
        }


class RegionCaptionEvaluator:
    """Exact match of a region's caption; ``region_caption_chance`` is the score of always giving the commonest one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all regions."""
        self._counts: dict[str, int] = defaultdict(int)
        self._correct: list[bool] = []

    def process(self, truth: str, answer: str | None) -> None:
        """Adds one region's true caption and the model's."""
        self._counts[normalise(truth)] += 1
        self._correct.append(normalise(answer or "") == normalise(truth))

    def evaluate(self) -> dict[str, Any]:
        """Metric -> value in 0..1, or None."""
        number = len(self._correct)
        return {
            "region_caption_accuracy": float(np.mean(self._correct)) if number else None,
            "region_caption_chance": max(self._counts.values()) / number if number else None,
            "regions": number,
        }


class RoutingEvaluator:
    """Accuracy of the LLM's choice in free chat: the routing token (or text) of the task that an instruction names."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all instructions."""
        self._correct: dict[str, list[bool]] = defaultdict(list)

    def process(self, task: str, route: str | None) -> None:
        """Adds one instruction of `task` and the routing token that the LLM chose (None: it wrote text)."""
        self._correct[task].append(route == get_task(task).routing_token)

    def evaluate(self) -> dict[str, Any]:
        """``routing_accuracy`` over all instructions, and ``routing_per_task``; None without instructions."""
        answers = [correct for values in self._correct.values() for correct in values]
        return {
            "routing_accuracy": float(np.mean(answers)) if answers else None,
            "routing_per_task": {task: float(np.mean(values)) for task, values in self._correct.items()},
            "routing_instructions": len(answers),
        }
