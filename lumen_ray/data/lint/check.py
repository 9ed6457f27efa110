"""The base class of the checks of `data lint`.

How to add a check
------------------
A class with its rules and what it looks at in a row, and its name in the table `checks.CHECKS`:

    class EmptyNames(Check):
        rule = Rule("empty-name", "problem", "objects", "the object has no class name; give it one")
        rules = (rule,)

        def row(self, row: LintRow) -> None:
            for index, name in enumerate(row.names):
                if not name:
                    self.add(self.rule, row, row.describe(index), index)

What depends on the whole set is set up in `begin`, counted in `row` and decided in `finish`, which can also `drop` a
rule's violations. Keep no row and no image: `add` keeps the few that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lumen_ray.data.lint.findings import Finding, Rule, Sample, SampleShelf
from lumen_ray.data.lint.rows import LintRow


@dataclass(frozen=True)
class Settings:
    """`min_side`: pixels, a box with a shorter side is tiny; `decode`: decode every image."""

    min_side: float = 2.0
    decode: bool = False


@dataclass
class SetFacts:
    """Facts about the whole input, known when all rows are read. `row_kind`: name of a row among the kinds of rejected
    records; `changed`: records cut by `prepare`, by change; `changed_in`: some of their images; `notes`: sentences of
    the source about its input."""

    categories: list[dict[str, Any]] = field(default_factory=list)
    row_kind: str = "images"
    rows: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    changed_in: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Check:
    """Looks for violations of its `rules` in the rows of a set; see the module's docstring."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self, settings: Settings, shelf: SampleShelf):
        self.settings = settings
        self._shelf = shelf
        self._found: dict[Rule, Finding] = {rule: Finding(rule) for rule in self.rules}
        self.begin()

    def begin(self) -> None:
        """Sets up what is counted over the whole set, before the first row."""

    def row(self, row: LintRow) -> None:
        """Examines one row."""

    def rejected(self, record: dict[str, str]) -> None:
        """Examines one rejected record: a row of `rejected.parquet`."""

    def finish(self, facts: SetFacts) -> None:
        """Decides what depends on the whole set, after the last row."""

    def add(self, rule: Rule, row: LintRow | None, detail: str, *objects: int, number: int = 1) -> None:
        """Counts a violation, of the instances `objects` of `row` if there are any; None: of the set as a whole."""
        finding = self._found.setdefault(rule, Finding(rule))
        finding.add(detail if row is None else f"{row.image_id}: {detail}", number)
        if row is not None and row.row["image"]:
            self._shelf.offer(finding, Sample(row.row, detail, objects))

    def number(self, rule: Rule) -> int:
        """The violations counted so far."""
        return self._found[rule].number

    def drop(self, rule: Rule) -> None:
        """Forgets the violations of a rule that turns out not to apply to the set."""
        self._shelf.clear(self._found[rule])
        self._found[rule] = Finding(rule)

    def findings(self) -> list[Finding]:
        """One finding per rule with violations."""
        return [finding for finding in self._found.values() if finding.number]
