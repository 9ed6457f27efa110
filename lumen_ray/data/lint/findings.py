"""Rules of `data lint` and their findings, with a few examples and sampled rows each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Row = dict[str, Any]
#: problem: training or scores suffer; warning: probably a mistake; note: a fact to know
Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
#: examples listed per finding
MAX_EXAMPLES = 5
_LONGEST_EXAMPLE = 300


@dataclass(frozen=True)
class Rule:
    """`name`: as in the table and in `lint.json`; `counts`: the unit of a finding's number, in the plural; `meaning`:
    one sentence that says what is wrong and how to mend it."""

    name: str
    severity: Severity
    counts: str
    meaning: str


@dataclass
class Sample:
    """A row that a finding is about, with its encoded image; `objects`: indices of the instances concerned."""

    row: Row
    detail: str
    objects: tuple[int, ...] = ()


@dataclass
class Finding:
    """The violations of one rule: their `number`, the first few as text, and sampled rows for the page."""

    rule: Rule
    number: int = 0
    examples: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def add(self, example: str, number: int = 1) -> None:
        """Counts `number` violations, and keeps the example if there is room."""
        self.number += number
        if len(self.examples) < MAX_EXAMPLES:
            text = " ".join(example.split())
            self.examples.append(text if len(text) <= _LONGEST_EXAMPLE else text[: _LONGEST_EXAMPLE - 3] + "...")

    @property
    def counted(self) -> str:
        """The number with its unit, e.g. ``"1 class"`` or ``"12 classes"``."""
        unit = self.rule.counts
        if self.number == 1:
            unit = unit.removesuffix("es") if unit.endswith("sses") else unit.removesuffix("s")
        return f"{self.number:,} {unit}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        rule = self.rule
        return {
            "check": rule.name,
            "severity": rule.severity,
            "number": self.number,
            "counts": rule.counts,
            "meaning": rule.meaning,
            "examples": self.examples,
        }


class SampleShelf:
    """At most `limit` sampled rows, shared evenly among the findings that want some. Bounds the memory for images."""

    def __init__(self, limit: int):
        self.limit = limit
        self._findings: list[Finding] = []
        self._held = 0

    def offer(self, finding: Finding, sample: Sample) -> None:
        """Keeps the sample while there is room, or in place of one of a finding that has at least two more."""
        if self._held >= self.limit:
            richest = max(self._findings, key=lambda f: len(f.samples), default=None)
            if richest is None or len(richest.samples) < len(finding.samples) + 2:
                return
            richest.samples.pop()
            self._held -= 1
        if not finding.samples and not any(f is finding for f in self._findings):
            self._findings.append(finding)
        finding.samples.append(sample)
        self._held += 1

    def clear(self, finding: Finding) -> None:
        """Drops the samples of a finding, which leaves room for others."""
        self._held -= len(finding.samples)
        finding.samples.clear()


@dataclass
class Report:
    """The result of `data lint`: `findings` by severity, each in the order of the table of checks."""

    title: str
    kind: str  # "shards" or the name of the source
    rows: int
    against: list[str]
    findings: list[Finding]

    @property
    def severities(self) -> dict[Severity, int]:
        """Number of findings per severity."""
        counts = Counter(f.rule.severity for f in self.findings)
        return {severity: counts[severity] for severity in SEVERITIES}

    @property
    def failed(self) -> bool:
        """Whether there is a finding other than notes."""
        return any(f.rule.severity != "note" for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the content of `lint.json`."""
        return {
            "input": self.title,
            "kind": self.kind,
            "rows": self.rows,
            "against": self.against,
            "severities": dict(self.severities),
            "findings": [f.to_dict() for f in self.findings],
        }

    def summary(self) -> str:
        """The numbers in one line, e.g. ``"364 rows: 1 problem, 2 warnings, no notes"``."""
        counts = [f"{n or 'no'} {s}{'s' * (n != 1)}" for s, n in self.severities.items()]
        return f"{self.rows:,} row{'s' * (self.rows != 1)}: {', '.join(counts)}"
