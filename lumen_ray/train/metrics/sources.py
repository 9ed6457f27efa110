"""A run's progress through each source of its shards, and its losses there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lumen_ray.train.losses import StepSums


def rows_by_source(manifest: dict[str, Any]) -> dict[str, int]:
    """Rows of each source in a shard folder; empty if it was written without their names."""
    groups = [group.get("sources") for file in manifest["files"] for group in file["row_groups"]]
    rows = Counter[str]()
    for sources in groups:
        rows.update(sources or {})
    return dict(sorted(rows.items())) if all(groups) else {}


class SourceProgress:
    """Counts the samples of each source that a run has trained on, over its restarts; rank 0 only."""

    def __init__(self, rows: Mapping[str, int], last: Mapping[str, Any] | None):
        """`rows`: of each source. `last`: the newest line of the metrics before the run goes on, None if there is
        none."""
        self._rows = rows
        self._seen = Counter({name: int((last or {}).get(f"samples/{name}", 0)) for name in rows})

    def add(self, sums: StepSums) -> dict[str, float]:
        """Adds a step; returns the values to log: samples so far, and passes over the source's rows."""
        self._seen.update(sums.samples)
        values: dict[str, float] = {f"samples/{name}": self._seen[name] for name in self._rows}
        return values | {f"passes/{name}": round(self._seen[name] / rows, 4) for name, rows in self._rows.items()}


def totals(means: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """{column: weighted sum over losses} of ``{"loss/column": mean}``, as for a task or a source."""
    found: dict[str, float] = {}
    for name, value in means.items():
        loss, column = name.split("/", 1)
        found[column] = found.get(column, 0.0) + weights.get(loss, 1.0) * value
    return found
