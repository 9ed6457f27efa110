"""How far a label job is, and how many errors end it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lumen_ray.errors import UserError

#: a limit of errors in percent counts from this many images
_FEWEST_FOR_SHARE = 100


@dataclass
class Status:
    """The progress of a job. `total`: images listed so far, all of them if `is_listed`; `finished_before`: images done
    in earlier runs."""

    total: int
    done: int = 0
    errors: int = 0
    finished_before: int = 0
    is_listed: bool = True
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return (self.done - self.finished_before) / max(time.monotonic() - self.started, 1e-9)

    def facts(self) -> dict[str, Any]:
        """The numbers as JSON types, with ``images_per_second`` and ``seconds_left`` (None while unknown)."""
        left = (self.total - self.done) / self.rate if self.is_listed and self.rate > 0 else None
        return {
            "done": self.done,
            "total": self.total,
            "is_listed": self.is_listed,
            "errors": self.errors,
            "images_per_second": round(self.rate, 2),
            "seconds_left": None if left is None else round(left),
        }


@dataclass(frozen=True)
class ErrorLimit:
    """Stops a job once more than `most` images have failed, or more than `share` (0..1) of them."""

    text: str = ""
    most: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, given: str | int | None) -> ErrorLimit:
        """``50``, ``"50"`` or ``"5%"``. Raises `UserError` for others."""
        if given is None:
            return cls()
        text = str(given).strip()
        try:
            value = float(text.removesuffix("%"))
            if value < 0 or value != value:
                raise ValueError
            return cls(text, share=value / 100) if text.endswith("%") else cls(text, most=int(text))
        except ValueError:
            raise UserError(
                f"max_errors is '{given}'; give a number of images such as 50, or a share such as 5%", "invalid_setting"
            ) from None

    def check(self, status: Status) -> None:
        """Raises `UserError` (`too_many_errors`) if the limit is passed."""
        if status.done >= min(_FEWEST_FOR_SHARE, status.total) or self.share is None:
            self.check_numbers(status.errors, status.done)

    def check_numbers(self, errors: int, done: int) -> None:
        """The same, for `errors` of `done` images."""
        too_many = self.most is not None and errors > self.most
        too_many |= self.share is not None and errors > self.share * done
        if too_many:
            raise UserError(
                f"stopped after {done} images with {errors} errors, more than the limit of {self.text}; "
                "see 'lumen-ray label status' for the reasons; run again with a higher limit to continue",
                "too_many_errors",
            )
