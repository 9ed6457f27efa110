"""A report of a labelled folder: counts, class balance, scores, empty and crowded images, errors by reason."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.duplicates import FoundDuplicates
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.statistics import BINS, ClassStatistics, collect
from lumen_ray.tasks import Task

_PAGE = Template((Path(__file__).parents[1] / "report.html").read_text())
#: classes of a task in its table, those with most instances first
_MOST_CLASSES = 200


class Report(Exporter):
    """``report.html``, one page without outside files."""

    single_file = "report.html"

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        statistics = collect(labels)
        totals = labels.ledger.totals()
        facts = {
            "images": f"{totals['images']:,}",
            "labelled": f"{totals['labelled']:,}",
            "errors": f"{totals['errors']:,}",
            "tasks": ", ".join(labels.tasks),
            **_duplicates(labels, settings.near_distance),
            "score from": labels.job.get("score_threshold", ""),
        }
        page = _PAGE.substitute(
            facts="".join(f"<div><dt>{_safe(k)}</dt><dd>{_safe(v)}</dd></div>" for k, v in facts.items()),
            tasks="".join(
                _task(task, classes, statistics.empty[task], statistics.images)
                for task, classes in statistics.classes.items()
            ),
            lists=_list("Most instances of one task", "instances", statistics.crowded, ".0f")
            + _list("Lowest best score", "best score", statistics.unsure, ".2f"),
            errors=_errors(totals["reasons"]),
        )
        target.write_text(page, encoding="utf-8")


def _duplicates(labels: Labels, near_distance: int) -> dict[str, str]:
    """Of labels with perceptual hashes, the numbers of images that are duplicates of earlier ones."""
    found = FoundDuplicates(labels, near_distance)
    if not found.has_perceptual_hashes:
        return {}
    counts = found.groups.counts
    return {"exact duplicates": f"{counts['exact']:,}", "near duplicates": f"{counts['near']:,}"}


def _safe(text: Any) -> str:
    return html.escape(str(text))


def _task(task: str, classes: dict[str, ClassStatistics], empty: int, images: int) -> str:
    shown = list(classes.items())[:_MOST_CLASSES]
    most = max((counts.instances for _, counts in shown), default=0)
    rows = "".join(_row(name, counts, most) for name, counts in shown)
    total = sum(counts.instances for counts in classes.values())
    absent = sum(counts.instances == 0 for counts in classes.values())
    more = f" The table has the {_MOST_CLASSES} most frequent classes." if len(classes) > _MOST_CLASSES else ""
    return (
        f"<h2>{_safe(task)}</h2>"
        f"<p>{total:,} instances of {len(classes) - absent} classes, {absent} classes without one. "
        f"Nothing was found in {empty:,} of {images:,} images ({empty / max(images, 1):.1%}).{more}</p>"
        "<table><tr><th>class</th><th class=number>instances</th><th></th><th class=number>images</th>"
        f"<th class=number>median score</th><th>scores from 0 to 1</th></tr>{rows}</table>"
    )


def _row(name: str, counts: ClassStatistics, most: int) -> str:
    width = 160 * counts.instances / max(most, 1)
    median = f"{counts.median:.2f}" if counts.instances else ""
    bar = f'<span class=bar style="width:{width:.0f}px"></span>' if counts.instances else ""
    return (
        f"<tr><td>{_safe(name)}</td><td class=number>{counts.instances:,}</td><td>{bar}</td>"
        f"<td class=number>{counts.images:,}</td><td class=number>{median}</td><td>{_histogram(counts)}</td></tr>"
    )


def _histogram(counts: ClassStatistics) -> str:
    highest = max(counts.histogram)
    if not highest:
        return ""
    bars = "".join(
        f'<rect x="{6 * number}" y="{24 - 24 * count / highest:.1f}" width="5" height="{24 * count / highest:.1f}">'
        f"<title>{number / BINS:.2f} to {(number + 1) / BINS:.2f}: {count:,}</title></rect>"
        for number, count in enumerate(counts.histogram)
        if count
    )
    name = f"scores: {', '.join(map(str, counts.histogram))}"
    return f'<svg width="{6 * BINS}" height="24" role="img" aria-label="{name}">{bars}</svg>'


def _list(title: str, column: str, entries: Sequence[tuple[float, str]], form: str) -> str:
    if not entries:
        return ""
    rows = "".join(f"<tr><td>{_safe(i)}</td><td class=number>{value:{form}}</td></tr>" for value, i in entries)
    return f"<div><h2>{title}</h2><table><tr><th>image</th><th class=number>{column}</th></tr>{rows}</table></div>"


def _errors(reasons: dict[str, int]) -> str:
    if not reasons:
        return ""
    rows = "".join(
        f"<tr><td><code>{_safe(reason)}</code></td><td class=number>{number:,}</td></tr>"
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1])
    )
    head = "<table><tr><th>reason</th><th class=number>images</th></tr>"
    return f"<h2>Images that could not be labelled</h2><p>errors.parquet names them.</p>{head}{rows}</table>"
