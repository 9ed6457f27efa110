"""How far a label job is, and how many errors end it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lumen_ray.errors import UserError
from lumen_ray.label.spent import Spent, cost_text

if TYPE_CHECKING:
    from lumen_ray.label.workers import Outcome

#: a limit of errors in percent counts from this many images
_FEWEST_FOR_SHARE = 100


@dataclass
class Status:
    """The progress of a job. `counted`: what the numbers count, "images", or "requests" of a batch file, here called
    images. `total`: images listed so far, all of them if `is_listed`; `finished_before`: images done
    in earlier runs; `copied`: of the done ones, with the labels of an image with the same bytes.

    `fragments`: those done of `num_fragments`, which is None while the input is being listed. `seconds` and
    `busy_seconds`: of the workers of this run together, as in `Outcome`. `spent`: of all runs; None: not counted.
    `started`, `began`: by `time.monotonic`, when the run started, and when its first worker was ready, as its first
    result tells.
    """

    total: int
    done: int = 0
    errors: int = 0
    finished_before: int = 0
    is_listed: bool = True
    started: float = field(default_factory=time.monotonic)
    copied: int = 0
    fragments: int = 0
    num_fragments: int | None = None
    seconds: float = 0.0
    busy_seconds: float = 0.0
    spent: Spent | None = None
    counted: str = "images"
    began: float | None = None

    @property
    def rate(self) -> float:
        """Images per second since the first worker was ready, 0 before the first result."""
        if self.began is None:
            return 0.0
        return (self.done - self.finished_before) / max(time.monotonic() - self.began, 1e-9)

    @property
    def model_busy(self) -> float | None:
        """The share of the workers' time, 0..1, for which their models were at work; None before the first result."""
        return min(1.0, self.busy_seconds / self.seconds) if self.seconds > 0 else None

    def add(self, outcome: Outcome) -> None:
        """Counts what a worker has just done."""
        ready = time.monotonic() - outcome.seconds
        self.began = ready if self.began is None else min(self.began, ready)
        self.done += outcome.done
        self.errors += outcome.errors
        self.copied += outcome.copied
        self.fragments += outcome.fragments
        self.seconds += outcome.seconds
        self.busy_seconds += outcome.busy_seconds

    def facts(self) -> dict[str, Any]:
        """The numbers as JSON types, with ``images_per_second`` (or ``requests_per_second``), ``seconds_left`` (None
        while unknown), and what `spent_facts` returns.

        ``fragments_left``: those that wait or are being labelled, None while the input is being listed.
        """
        left = (self.total - self.done) / self.rate if self.is_listed and self.rate > 0 else None
        return {
            "done": self.done,
            "total": self.total,
            "is_listed": self.is_listed,
            "errors": self.errors,
            "copied": self.copied,
            f"{self.counted}_per_second": round(self.rate, 2),
            "seconds_left": None if left is None else round(left),
            "fragments_left": None if self.num_fragments is None else self.num_fragments - self.fragments,
            **self.spent_facts(left),
        }

    def notes(self) -> list[str]:
        """What there is to say of copies, the workers' models and the cost, in words."""
        facts = self.facts()
        notes = [f"{self.copied:,} copied"] if self.copied else []
        if self.model_busy is not None:
            notes.append(f"model busy {self.model_busy:.0%}")
        if facts["usd"] is not None:
            notes.append(cost_text(facts["usd"], facts["usd_expected"]))
        return notes

    def spent_facts(self, seconds_left: float | None) -> dict[str, Any]:
        """``model_busy`` (see there), ``spent_seconds`` of all runs, their cost ``usd`` and what the whole job will
        cost, ``usd_expected``; None where unknown."""
        busy, spent = self.model_busy, self.spent
        return {
            "model_busy": None if busy is None else round(busy, 3),
            "spent_seconds": None if spent is None else round(spent.seconds, 1),
            "usd": None if spent is None else _cents(spent.usd),
            "usd_expected": None if spent is None else _cents(spent.usd_expected(seconds_left)),
        }


def _cents(usd: float | None) -> float | None:
    """To a hundredth of a cent."""
    return None if usd is None else round(usd, 4)


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
            if not 0 <= value <= (100 if text.endswith("%") else math.inf):
                raise ValueError
            return cls(text, share=value / 100) if text.endswith("%") else cls(text, most=int(text))
        except ValueError:
            raise UserError(
                f"max_errors is '{given}'; give a number such as 50, or a share up to 100% such as 5%",
                "invalid_setting",
            ) from None

    def check(self, status: Status) -> None:
        """Raises `UserError` (`too_many_errors`) if the limit is passed."""
        if status.done >= min(_FEWEST_FOR_SHARE, status.total) or self.share is None:
            self.check_numbers(status.errors, status.done, status.counted)

    def check_numbers(self, errors: int, done: int, counted: str = "images") -> None:
        """The same, for `errors` of `done` images or what else is `counted`."""
        too_many = self.most is not None and errors > self.most
        too_many |= self.share is not None and errors > self.share * done
        if too_many:
            raise UserError(
                f"stopped after {done} {counted} with {errors} errors, more than the limit of {self.text}; "
                "see 'lumen-ray label status' for the reasons; run again with a higher limit to continue",
                "too_many_errors",
            )
