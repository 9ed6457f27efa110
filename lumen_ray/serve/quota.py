"""What one API key may do in a minute and at a time, in one ingress replica."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Quota:
    """A token bucket of requests, full at first, and the number of requests at a time; None is no limit."""

    def __init__(
        self,
        per_minute: int | None,
        at_a_time: int | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.per_minute = per_minute
        self.at_a_time = at_a_time
        self.ongoing = 0
        self._clock = clock
        self._left: float = per_minute or 0
        self._counted = clock()

    def configure(self, per_minute: int | None, at_a_time: int | None) -> None:
        """Applies other limits, without a fresh bucket where the rate is the same."""
        self.at_a_time = at_a_time
        if per_minute != self.per_minute:
            self.per_minute, self._left, self._counted = per_minute, per_minute or 0, self._clock()

    def take(self) -> bool:
        """Counts a request, if the rate allows another one."""
        if self.per_minute is None:
            return True
        self._refill(self.per_minute)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    @property
    def is_full(self) -> bool:
        """Whether no further request may be worked on now."""
        return self.at_a_time is not None and self.ongoing >= self.at_a_time

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until the rate allows a request."""
        if self.per_minute is None:
            return 1
        self._refill(self.per_minute)
        return max(1, math.ceil((1 - self._left) * 60 / self.per_minute))

    def headers(self) -> dict[str, str]:
        """OpenAI's headers about the rate, without those about tokens, which are not counted."""
        if self.per_minute is None:
            return {}
        self._refill(self.per_minute)
        return {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(int(self._left)),
            "x-ratelimit-reset-requests": duration((self.per_minute - self._left) * 60 / self.per_minute),
        }

    def _refill(self, per_minute: int) -> None:
        now = self._clock()
        self._left = min(per_minute, self._left + (now - self._counted) * per_minute / 60)
        self._counted = now


def duration(seconds: float) -> str:
    """As OpenAI writes it: "120ms", "1.5s", "6m0s"."""
    milliseconds = math.ceil(1000 * seconds - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
