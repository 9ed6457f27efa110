"""A request about a row of a split together with the score of its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request

Row = dict[str, Any]


@dataclass(frozen=True)
class ScoredRequest:
    """A request, and the function that takes its answer into the metrics."""

    request: Request
    score: Callable[[Answer], None]
