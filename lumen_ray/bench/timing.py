"""Measures two sides in turns and reports the results.

Machines are shared and clock rates drift, so the sides take turns (A B A B ...) and the ratio is taken within each
turn: median and spread of these ratios are more reliable than two averages measured minutes apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

Measure = Callable[[], float]


class SidesDiffer(RuntimeError):
    """The sides of a comparison compute different results, so their speeds must not be compared."""


@dataclass
class Result:
    """One comparison: the rates of every turn by side, the first side over the second.

    `aim`: the required ratio, if any; `equal`: the results that were checked to be equal on both sides.
    """

    name: str
    unit: str
    rates: dict[str, list[float]]
    aim: float | None = None
    equal: str = ""
    budget: str = ""  # the CPUs or device each side had
    details: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""  # reason why nothing was measured
    failed: str = ""  # difference between the sides, in place of rates
    note: str = ""  # conditions and limits of the figures

    @property
    def ratios(self) -> list[float]:
        """First side over second, turn by turn; empty unless there are two sides."""
        sides = list(self.rates.values())
        return [a / b for a, b in zip(sides[0], sides[1], strict=True)] if len(sides) == 2 else []

    @property
    def reached(self) -> bool | None:
        """Whether the median ratio is the aim or more; None without an aim or measurements, False if the bench
        failed."""
        if self.failed:
            return False
        return None if self.aim is None or not self.ratios else statistics.median(self.ratios) >= self.aim

    def verdict(self) -> str:
        """One line: reached, missed or failed, the ratio with its spread over the turns, the aim."""
        if self.skipped:
            return f"{self.name} was left out: {self.skipped}"
        if self.failed:
            return f"{self.name} failed: {self.failed}"
        if not self.ratios:
            rates = (f"{n} {_range(spread(r), '.1f')} {self.unit}" for n, r in self.rates.items())
            return f"{self.name}: {', '.join(rates)}" + (f"; {self.note}" if self.note else "")
        first, second = self.rates
        turns = f"{len(self.ratios)} turn" + ("s" if len(self.ratios) > 1 else "")
        ratio = f"{first} / {second} is {_range(spread(self.ratios), '.3f')} over {turns}"
        if self.reached is None:
            return f"{self.name}: {ratio}; there is no aim"
        return f"{self.name}: {'reached' if self.reached else 'missed'}: {ratio}; the aim is {self.aim:g}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, with median, lowest and highest of every side and of the ratio."""
        if self.skipped:
            return {"name": self.name, "skipped": self.skipped}
        if self.failed:
            return {"name": self.name, "failed": self.failed, "reached": False}
        return {
            "name": self.name,
            "unit": self.unit,
            "sides": {side: spread(rates) | {"turns": rates} for side, rates in self.rates.items()},
            "ratio": spread(self.ratios) if self.ratios else None,
            "aim": self.aim,
            "reached": self.reached,
            "equal": self.equal,
            "budget": self.budget,
            **({"note": self.note} if self.note else {}),
            **self.details,
        }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def in_turns(sides: dict[str, Measure], turns: int) -> dict[str, list[float]]:
    """Rates of every side, `turns` times, one side after the other in each turn. Each side warms up by itself."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, measure in sides.items():
            rates[name].append(measure())
    return rates


def table(results: Iterable[Result]) -> Table:
    """A table of the results to print."""
    out = Table(box=None, pad_edge=False)
    for head in ("benchmark", "side", "median (low - high)", "unit", "ratio (low - high)", "aim"):
        out.add_column(head, no_wrap=True)
    for result in results:
        ratio = spread(result.ratios) if result.ratios else None
        for number, (side, rates) in enumerate(result.rates.items()):
            first = number == 0
            out.add_row(
                result.name if first else "",
                side,
                _range(spread(rates), ".1f"),
                result.unit,
                _range(ratio, ".2f") if ratio and first else "",
                f"{result.aim:g}" if result.aim and first else "",
            )
    return out


def _range(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['low']:{form}} - {values['high']:{form}})"
