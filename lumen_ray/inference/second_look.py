"""A second look at answers, over images that are encoded once: whether another decoder finds the same, and what the
model says when it is asked about each instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.inference.protocol import EncodingEngine, EngineProtocol
from lumen_ray.inference.request import RegionQuestion, Request, Shown, box_region
from lumen_ray.structures import Prediction, Size
from lumen_ray.tasks import TASKS

Rows = Sequence[Sequence[Request]]
Answers = list[list[Answer]]


class SecondLook:
    """An engine whose instances carry `agreement` with the decoder `agree_with` (None: not asked), and the probability
    `verified` if `verify`. See `Prediction.marks`.

    `tasks`: those that are asked. Raises `UserError` if the decoder cannot be asked, or the tokenizer cannot verify.
    """

    def __init__(self, engine: EncodingEngine, tasks: Sequence[str], agree_with: str | None, verify: bool):
        self.engine, self.verify = engine, verify
        self._other: EngineProtocol | None = None
        self._compared: frozenset[str] = frozenset()
        if agree_with is not None:
            self._other = engine.beside(agree_with, tasks)
            self._compared = frozenset(
                task for task, decoder in self._other.serving.items() if engine.serving.get(task) != decoder
            )
        if verify:
            engine.ask_regions(None, [])

    @property
    def largest_side(self) -> int:
        """As of the engine."""
        return self.engine.largest_side

    def encode(self, images: Sequence[Shown]) -> Any:
        """As of the engine."""
        return self.engine.encode(images)

    def run(self, images: Any, requests: Rows, **options: Any) -> Answers:
        """As `Engine.run`, which takes the options. `images`: a list, or what `encode` returned."""
        if not isinstance(images, list):
            return self._run(images, requests, **options)
        groups: dict[Size, list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(self.engine.input_size(image), []).append(number)
        answers: dict[int, list[Answer]] = {}
        for members in groups.values():
            encoded = self.encode([images[i] for i in members])
            found = self._run(encoded, [requests[i] for i in members], **options)
            answers |= dict(zip(members, found, strict=True))
        return [answers[i] for i in range(len(images))]

    def _run(self, encoded: Any, requests: Rows, **options: Any) -> Answers:
        answers = self.engine.run(encoded, requests, **options)
        if self._other is not None:
            asked = [[request for request in row if request.task in self._compared] for row in requests]
            if any(asked):
                found = self._other.run(encoded, asked, **options)
                answers = [self._compare(row, others) for row, others in zip(answers, found, strict=True)]
        return self._verified(encoded, answers) if self.verify else answers

    def _compare(self, answers: Sequence[Answer], others: Sequence[Answer]) -> list[Answer]:
        """The answers about an image with their agreement; `others`: of the other decoder, to the compared tasks."""
        following = iter(others)
        return [with_agreement(a, next(following)) if a.task in self._compared else a for a in answers]

    def _verified(self, encoded: Any, answers: Answers) -> Answers:
        questions = [
            RegionQuestion(image, box_region(p.boxes, i), p.phrase)
            for image, row in enumerate(answers)
            for answer in row
            if not TASKS[answer.task].is_text
            for p in answer.predictions
            for i in range(len(p))
        ]
        said = iter(self.engine.ask_regions(encoded, questions))

        def marked(answer: Answer) -> Answer:
            if TASKS[answer.task].is_text:
                return answer
            found = [p.marked(verified=[next(said) for _ in p.scores]) for p in answer.predictions]
            return answer.with_predictions(found)

        return [[marked(answer) for answer in row] for row in answers]


def with_agreement(answer: Answer, other: Answer) -> Answer:
    """The answer with the agreement of each instance: its IoU with the best instance of the same phrase in `other`, of
    masks where both have them, else of boxes; 0 without one."""
    pairs = zip(answer.predictions, other.predictions, strict=True)
    return answer.with_predictions([one.marked(agreement=_best_iou(one, two)) for one, two in pairs])


def _best_iou(one: Prediction, two: Prediction) -> np.ndarray:
    """float32 [N]."""
    if not len(two):
        return np.zeros(len(one), np.float32)
    if one.masks is not None and two.masks is not None:
        return one.masks.iou(two.masks).max(1)
    return one.boxes.iou(two.boxes).max(1)
