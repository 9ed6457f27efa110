"""What `data lint` reads: a shard folder, or a source of `prepare` without writing shards.

Both give `sources.base.Outcome`s, one row in memory at a time (of a shard folder: one row group).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from lumen_ray.data import urls
from lumen_ray.data.lint.check import SetFacts
from lumen_ray.data.shards.shards import Changes, read_manifest, read_rejected, read_rows
from lumen_ray.data.sources.base import Outcome, Source

Progress = Callable[[int, int], None]  # records done, records in all


class LintInput(Protocol):
    """`title`: names the input; `kind`: "shards" or the source's name."""

    title: str
    kind: str

    def outcomes(self, progress: Progress | None = None) -> Iterator[Outcome]:
        """All rows and rejected records. Raises `UserError` for input that cannot be read."""

    def facts(self) -> SetFacts:
        """Facts about the input; complete when `outcomes` is exhausted."""


class ShardInput:
    """A shard folder, local or a URL. Raises `UserError` if it is none."""

    kind = "shards"

    def __init__(self, folder: urls.Location):
        self._folder = folder
        self._manifest = read_manifest(folder)
        self.title = urls.shown(folder)

    def outcomes(self, progress: Progress | None = None) -> Iterator[Outcome]:
        total = sum(entry["rows"] for entry in self._manifest["files"])
        for number, row in enumerate(read_rows(self._folder), start=1):
            yield Outcome(row)
            if progress is not None:
                progress(number, total)
        for record in read_rejected(self._folder):
            yield Outcome(rejected=[record])

    def facts(self) -> SetFacts:
        manifest = self._manifest
        return SetFacts(
            manifest["categories"],
            next(iter(manifest.get("counts") or {}), "images"),  # `prepare` lists the kind of a row first
            changed=manifest.get("changed") or {},
            changed_in=manifest.get("changed_in") or {},
            notes=list(manifest.get("notes") or ()),
        )


class SourceInput:
    """The rows that `prepare` would write from a source."""

    def __init__(self, source: Source):
        self._source = source
        self.kind = source.kind
        self.title = " ".join([source.kind, *_paths(source)])
        self._facts = SetFacts(row_kind=source.row_kind)

    def outcomes(self, progress: Progress | None = None) -> Iterator[Outcome]:
        listing = self._source.read_listing()
        self._facts.categories = listing.categories
        self._facts.notes = list(getattr(listing, "notes", ()))
        changed = Changes()
        yield from (Outcome(rejected=[record]) for record in listing.rejected)
        for number, record in enumerate(listing.records, start=1):
            for outcome in self._source.rows(json.loads(json.dumps(record)), listing.shared):  # as `prepare` does
                changed.add(outcome.changed, outcome.row)
                yield outcome
            if progress is not None:
                progress(number, len(listing.records))
        self._facts.changed, self._facts.changed_in = dict(sorted(changed.numbers.items())), changed.images

    def facts(self) -> SetFacts:
        return self._facts


def _paths(source: Source) -> list[str]:
    """The source's settings that are texts with a path or a file name."""
    values: list[Any] = []
    for value in source.settings().values():
        values += value if isinstance(value, list) else [value]
    return [value for value in values if isinstance(value, str) and "." in value]
