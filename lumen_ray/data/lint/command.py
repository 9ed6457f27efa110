"""`data lint`: examines a shard folder, or a source before `prepare`, for what would spoil training or scores.

Rows stream through the checks of `checks.CHECKS`. In memory stay a few hashes and the id of each row, counts per class
and caption, and at most as many images as the page shows samples.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lumen_ray.data import files, urls
from lumen_ray.data.lint.check import SetFacts, Settings
from lumen_ray.data.lint.checks import CHECKS
from lumen_ray.data.lint.copies import Leaks
from lumen_ray.data.lint.findings import SEVERITIES, Finding, Report, SampleShelf, Severity
from lumen_ray.data.lint.inputs import LintInput, Progress, ShardInput, SourceInput
from lumen_ray.data.lint.records import REJECTED
from lumen_ray.data.lint.rows import LintRow
from lumen_ray.data.shards.shards import MANIFEST, read_manifest, read_rows
from lumen_ray.data.sources.base import Source
from lumen_ray.data.sources.registry import SOURCES
from lumen_ray.errors import UserError, suggest, unknown

SAMPLES = 24
MIN_SIDE = 2.0
_AGAINST_COLUMNS = ("image_id", "image", "height", "width", "further_images")
_STYLES: dict[Severity, str] = {"problem": "bold red", "warning": "yellow", "note": "dim"}


def is_source(name: str, words: Sequence[str] = ()) -> bool:
    """Whether the command's input names a source. A shard folder of that name comes first, unless one of the `words`
    behind it is an option of the source.

    Raises `UserError` if it is neither a source nor a folder.
    """
    if name in SOURCES:
        options = {argument.flag for argument in SOURCES[name].arguments}
        given = any(word.split("=")[0] in options for word in words)
        return given or not files.is_file(urls.join(urls.absolute(name), MANIFEST))
    if not files.exists(name) and not urls.is_url(name):
        raise UserError(
            f"'{name}' is neither a shard folder nor a source;{suggest(name, SOURCES)} sources: {', '.join(SOURCES)}",
            "not_shards",
        )
    return False


def rule_names() -> list[str]:
    """The names of all checks; those about rejected records have the records' kind behind `records.REJECTED`."""
    return [rule.name for check in CHECKS for rule in check.rules]


def lint(
    data: urls.Location | Source,
    output: urls.Location,
    *,
    against: Sequence[urls.Location] = (),
    samples: int = SAMPLES,
    min_side: float = MIN_SIDE,
    decode: bool = False,
    ignore: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[Report, str]:
    """Examines a shard folder or a source; writes ``lint.json`` and the page ``index.html`` into `output`.

    against: shard folders that must have no image in common with the data. samples: most pictures on the page.
    min_side: pixels, boxes with a shorter side are reported. decode: decode every image of a shard folder (a source's
    images are decoded anyway). ignore: names of checks whose findings are left out. progress: called with (records
    done, records in all).

    Returns the report and the page's location. Raises `UserError` for input that cannot be read, an output that cannot
    be created, and invalid settings.
    """
    for name, value in (("samples", samples), ("min_side", min_side)):
        if not value >= 0:
            raise UserError(f"{name} is {value}; give 0 or more", "invalid_setting")
    names = rule_names()
    for name in ignore:
        if name not in names and not name.startswith(REJECTED):
            raise unknown("check", name, names)
    given: LintInput = SourceInput(data) if isinstance(data, Source) else ShardInput(data)
    for folder in against:
        read_manifest(folder)  # fails before the work
    output = urls.absolute(output)
    files.make_folder(output)
    settings = Settings(min_side, decode)
    findings, facts = examine(given, settings, against=against, samples=samples, progress=progress)
    findings = [finding for finding in findings if finding.rule.name not in ignore]
    report = Report(given.title, given.kind, facts.rows, [urls.shown(folder) for folder in against], findings)
    files.write_bytes(urls.join(output, "lint.json"), json.dumps(report.to_dict(), indent=1).encode())
    from lumen_ray.data.lint.page import page  # imports torch

    location = urls.join(output, "index.html")
    files.write_bytes(location, page(report, facts.categories).encode())
    return report, location


def examine(
    given: LintInput,
    settings: Settings,
    *,
    against: Sequence[urls.Location] = (),
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> tuple[list[Finding], SetFacts]:
    """The findings of all checks, by severity, and facts about the input; arguments as of `lint`."""
    shelf = SampleShelf(samples)
    checks = [check(settings, shelf) for check in CHECKS]
    rows = 0
    for outcome in given.outcomes(progress):
        for record in outcome.rejected:
            for check in checks:
                check.rejected(record)
        if outcome.row is not None:
            rows += 1
            row = LintRow(outcome.row)
            for check in checks:
                check.row(row)
    for folder in against:
        leaks = [check for check in checks if isinstance(check, Leaks)]
        for other in read_rows(folder, _AGAINST_COLUMNS):
            row = LintRow(other | {"instances": [], "classes": []})
            for check in leaks:
                check.other(row, urls.shown(folder))
    facts = given.facts()
    facts.rows = rows
    for check in checks:
        check.finish(facts)
    found = [finding for check in checks for finding in check.findings()]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.rule.severity)), facts


def print_report(report: Report, console: Console) -> None:
    """Prints the findings as a table on a terminal; as plain lines, never truncated, in a pipe or log file."""
    if not console.is_terminal:
        for finding in report.findings:
            rule = finding.rule
            lines = [f"{rule.severity}: {rule.name}, {finding.counted}: {rule.meaning}"]
            lines += [f"    {example}" for example in finding.examples]
            console.print("\n".join(lines), soft_wrap=True, markup=False)
        return
    table = Table(header_style="dim", show_lines=True)
    table.add_column("severity")
    table.add_column("check", no_wrap=True)
    table.add_column("number", justify="right")
    table.add_column("meaning, and an example", overflow="fold", ratio=1)
    for finding in report.findings:
        rule = finding.rule
        text = Text(rule.meaning)
        if finding.examples:
            text.append(f"\n{finding.examples[0]}", "dim")
        style = _STYLES[rule.severity]
        table.add_row(Text(rule.severity, style), Text(rule.name), finding.counted, text)
    if report.findings:
        console.print(table)
