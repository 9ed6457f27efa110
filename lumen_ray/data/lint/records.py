"""Records that were left out or changed, rows without a task, and the source's notes."""

from __future__ import annotations

from dataclasses import replace

from lumen_ray.data.lint.check import Check, SetFacts
from lumen_ray.data.lint.findings import SEVERITIES, Finding, Rule, Severity
from lumen_ray.data.lint.rows import LintRow
from lumen_ray.data.shards.statistics import general

#: findings about rejected records; those of further reasons share one
MAX_REASONS = 40
#: a finding about rejected records is named after their kind, e.g. "rejected-images"
REJECTED = "rejected-"
#: how the reason of a record begins that is lost with its image
WITH_IMAGE = "its image was rejected"
#: the rule of a record that repeats another one
REPEATED = "repeated"


class Records(Check):
    """Rows that train nothing, and an input without rows."""

    no_rows = Rule(
        "no-rows", "problem", "sets",
        "the input has no row that can be used; the rejected records say why",
    )  # fmt: skip
    no_task = Rule(
        "no-task", "warning", "rows",
        "rows are annotated for no task and train nothing; annotate them, or leave them out",
    )  # fmt: skip
    rules = (no_rows, no_task)

    def row(self, row: LintRow) -> None:
        if not row.row["tasks"]:
            self.add(self.no_task, row, "no classes, objects or texts that train a task")

    def finish(self, facts: SetFacts) -> None:
        if not facts.rows:
            self.add(self.no_rows, None, "nothing to train on")


class RejectedRecords(Check):
    """The records that `prepare` leaves out, one finding per kind and rule (per reason, if the shards have no rules).

    A lost image or other whole row is a problem, a lost annotation a warning. Records lost with their image and
    repetitions, of which `prepare` keeps the first, are a note.
    """

    def begin(self) -> None:
        self._groups: dict[tuple[str, str], Finding] = {}  # by kind and rule

    def rejected(self, record: dict[str, str]) -> None:
        kind, reason = record["kind"], record["reason"]
        lost = record.get("rule") == "image_rejected" or reason.startswith(WITH_IMAGE)
        what = WITH_IMAGE if lost else record.get("rule") or general(reason)
        if (kind, what) not in self._groups and len(self._groups) >= MAX_REASONS:
            what = "other reasons"
        if (kind, what) not in self._groups:
            severity: Severity = "note" if lost or what == REPEATED else "warning"
            rule = Rule(REJECTED + kind, severity, kind, _meaning(kind, what, record))
            self._groups[kind, what] = Finding(rule)
        name = f"{record['image_id']} " if record["image_id"] else ""
        self._groups[kind, what].add(f"{name}({record['origin']})" + f": {reason}" * (not lost))

    def finish(self, facts: SetFacts) -> None:
        for (kind, _), finding in self._groups.items():
            if kind == facts.row_kind and finding.rule.severity != "note":
                finding.rule = replace(finding.rule, severity="problem")

    def findings(self) -> list[Finding]:
        ranked = sorted(self._groups.values(), key=lambda finding: -finding.number)
        return sorted(ranked, key=lambda finding: SEVERITIES.index(finding.rule.severity))


def _meaning(kind: str, what: str, record: dict[str, str]) -> str:
    """Why records are left out and how to mend it: the rule of `prepare`, or the reason in general."""
    if what == WITH_IMAGE:
        return f"{kind} are left out because their image is; mend the image"
    mend = record.get("mend") or "correct the records that the examples name"
    return f"{kind} are left out ({what.replace('_', ' ')}); {mend}"


class Notes(Check):
    """What `prepare` changed or noted while it read the input."""

    def finish(self, facts: SetFacts) -> None:
        for change, number in facts.changed.items():
            rule = Rule("changed", "note", "records", f"prepare cut or changed records: {change}")
            images = facts.changed_in.get(change) or [change]
            self.add(rule, None, images[0], number=number)
            for name in images[1:]:
                self.add(rule, None, name, number=0)
        for note in facts.notes:
            self.add(Rule("input", "note", "sets", note), None, note)
