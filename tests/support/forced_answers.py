"""An engine whose LLM writes what a test wants it to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lumen_ray.inference.decode_loop import DecodeLoop


def force_answers(monkeypatch: Any, loop: DecodeLoop, tokens: Sequence[int]) -> None:
    """Makes these tokens the most probable ones of every answer, in their order."""
    choose = loop._choose

    def forced(writings, logits):
        logits = logits.clone().zero_()
        for number, writing in enumerate(writings):
            logits[number, tokens[len(writing.tokens)]] = 1e4
        choose(writings, logits)

    monkeypatch.setattr(loop, "_choose", forced)
