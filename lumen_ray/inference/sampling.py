"""How the tokens of a text answer are chosen: greedily, or drawn from the LLM's distribution.

Each answer has a generator of its own, so that in float32 a seed gives the same answer whatever else is in the batch.
In bf16 the logits themselves depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lumen_ray.errors import UserError

_MAX_STOPS = 16
_COLDEST = 1e-5  # below, logits over the temperature may be infinite


@dataclass(frozen=True)
class Sampling:
    """`temperature`: 0 takes the most probable token, as does a `top_k` of 1; `top_p`: draw from the most probable
    tokens that together have this probability; `top_k`: at most so many of them, 0 for all; `repetition_penalty`:
    above 1 makes tokens of the prompt and the answer less probable (Keskar et al., arXiv 1909.05858, sec. 4.1); `seed`:
    of the draws; `stop`: texts that end the answer, not part of it; `top_log_probs`: the number of most probable tokens
    at each place, 0 to 20, whose log probabilities the answer has.

    Raises `UserError` (`invalid_sampling`) for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 10), ("top_p", 0, 1), ("repetition_penalty", 0.01, 10)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"'{name}' must be a number from {low} to {high}, got {value!r}", "invalid_sampling")
        for name, high in (("top_k", 2**31), ("seed", 2**63 - 1), ("top_log_probs", 20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                raise UserError(f"'{name}' must be a whole number from 0 to {high}, got {value!r}", "invalid_sampling")
        if (
            not isinstance(self.stop, list | tuple)
            or len(self.stop) > _MAX_STOPS
            or not all(isinstance(text, str) and text for text in self.stop)
        ):
            raise UserError(f"'stop' must be at most {_MAX_STOPS} texts, none of them empty", "invalid_sampling")

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most probable one."""
        return self.temperature < _COLDEST or self.top_k == 1


GREEDY = Sampling()


@dataclass
class Sampler:
    """Chooses the tokens of one answer. `prompt`: token ids before the answer, for the repetition penalty.

    `log_probs`: of the tokens chosen so far, by the LLM's own distribution (temperature 1, without penalties) over the
    tokens that the answer may have; `top`: the ids of the most probable ones there with theirs, if the settings ask.
    """

    settings: Sampling
    prompt: Sequence[int] = ()
    log_probs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.settings.seed)

    @property
    def is_plain(self) -> bool:
        """Whether it always takes the token of the largest logit."""
        return self.settings.is_greedy and self.settings.repetition_penalty == 1

    def record(self, token: int, log_prob: float, top: Sequence[tuple[int, float]] = ()) -> None:
        """Enters a token that was chosen. `top`: as of the fields, of at least so many as the settings ask for."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if most := self.settings.top_log_probs:
            self.top.append(list(top[:most]))

    def choose(self, logits: Tensor) -> int:
        """The next token from the LLM's logits [V]."""
        s = self.settings
        scores = logits.detach().double().cpu()  # float64: rounding must not decide a draw
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self.prompt, *self.tokens}), dtype=torch.int64)
            found = scores[seen]
            scores[seen] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if s.is_greedy:
            return int(scores.argmax())
        probabilities, order = (scores / s.temperature).softmax(-1).sort(descending=True, stable=True)
        if s.top_k:
            probabilities = probabilities[: s.top_k]
        before = probabilities.cumsum(0) - probabilities  # of more probable tokens; the first is always kept
        probabilities = probabilities[: max(1, int((before < s.top_p * probabilities.sum()).sum()))]
        draw = torch.rand(1, generator=self._generator, dtype=torch.float64) * probabilities.sum()
        place = int((probabilities.cumsum(0) <= draw).sum())
        return int(order[min(place, len(probabilities) - 1)])


def most_probable(logits: Tensor, total: Tensor, most: int) -> list[list[tuple[int, float]]]:
    """The `most` most probable tokens that may be written, best first, with their log probabilities, from logits [N, V]
    and the logarithms [N] of the sums of their exponentials."""
    if not most:
        return [[] for _ in logits]
    best = (logits.float() - total[:, None]).topk(min(most, logits.shape[-1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(i, value) for i, value in zip(ids, values, strict=True) if value > -torch.inf] for ids, values in rows]


def stop_at(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to the first of `stops` in it; None if there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def stable_text(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished answer that further tokens cannot change: without incomplete characters, blanks and a
    possible beginning of a stop text at its end."""
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip()
