"""What travels from the ingress to the model: one image and what is asked about it. Knows neither HTTP nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lumen_ray.inference.request import Request
from lumen_ray.structures import Answer
from lumen_ray.tasks import get_task


@dataclass(frozen=True)
class Query:
    """One task, with the limits of its answer."""

    request: Request
    score_threshold: float
    max_per_phrase: int

    @property
    def is_text(self) -> bool:
        """True when no decoder can be needed. In free chat the LLM decides, so a decoder has to stand by."""
        return get_task(self.request.task).is_text and self.request.task != "chat"


@dataclass(frozen=True)
class TrunkJob:
    """One image (uint8 [H, W, 3] RGB, EXIF-rotated), None for words alone, and what is asked about it. The pixels
    arrive read-only."""

    image: np.ndarray | None
    queries: tuple[Query, ...]
    max_new_tokens: int


def trim(answers: Sequence[Answer | None], queries: Sequence[Query]) -> list[Answer | None]:
    """The answers cut to each query's own score threshold and number of instances (a shared pass used the loosest)."""
    return [answer and _cut(answer, query) for answer, query in zip(answers, queries, strict=True)]


def _cut(answer: Answer, query: Query) -> Answer:
    kept = [p.above(query.score_threshold)[: query.max_per_phrase] for p in answer.predictions]
    return replace(answer, predictions=kept)
