"""Records which fragments of the input are done. A job killed anywhere resumes without duplicates or gaps.

`plan.py` cuts the input into fragments. A fragment's labels are written to ``labels/part-N.parquet``, then its entry to
``ledger/N.json``; each appears whole or not at all, in a folder or a bucket, and only the entry marks the fragment as
done. A file of labels without an entry is overwritten by the next run; readers take the valid files from the ledger.
The processes of a job share the folder and nothing else.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError
from lumen_ray.inference.records import ERROR_SCHEMA, LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.plan import Plan

_ENTRY = re.compile(r"(\d+)\.json")


class Ledger:
    """The ledger of one output folder, local or in a bucket. `schema`: of the rows that are published."""

    def __init__(self, output: urls.Location, schema: pa.Schema = LABEL_SCHEMA):
        self.output, self.schema = urls.absolute(output), schema
        self.folder = urls.join(self.output, "ledger")

    def plan(self, fragment_size: int = 32) -> Plan:
        return Plan(self.folder, fragment_size)

    def open(self, settings: dict[str, Any]) -> None:
        """Takes the folder for a job with `settings` (JSON types).

        Raises `UserError` if it holds labels made with other settings, naming the difference. The settings and the plan
        of a job that finished no fragment are replaced.
        """
        settings = json.loads(json.dumps(settings))
        files.make_folder(self.output)
        before = self.settings()
        if before and not urls.is_url(before.get("input", "")) and "input" in before:
            before["input"] = urls.absolute(before["input"])  # older folders have it as it was given
        changed = [key for key in sorted({*(before or {}), *settings}) if (before or {}).get(key) != settings.get(key)]
        if before is not None and not changed:
            return
        if before is not None and self.done():
            key = changed[0]
            more = f", and {', '.join(changed[1:])}" if changed[1:] else ""
            was, now = _short(before.get(key), settings.get(key))
            raise UserError(
                f"output '{urls.shown(self.output)}' holds labels made with other settings ({key} was {was}, now {now}"
                f"{more}); give a new output folder, or the same settings to resume",
                "other_settings",
            )
        self.plan().clear()
        self.remove_leftovers()
        self._write_json(self._path("job.json"), settings)

    def remove_leftovers(self) -> None:
        """Removes label files that no entry names, of fragments that a killed job was publishing."""
        folder = self._path("labels")
        if not files.is_dir(folder):
            return
        valid = {_part(fragment) for fragment in self.done()}
        for name in files.list_files(folder, (".parquet",)):
            if name.startswith("part-") and name not in valid:
                files.remove(urls.join(folder, name))

    def settings(self) -> dict[str, Any] | None:
        """The settings of the job; None for a folder without one."""
        path = self._path("job.json")
        return json.loads(files.read_text(path)) if files.is_file(path) else None

    def publish(
        self, fragment: int, images: int, records: Sequence[dict[str, Any]], errors: Sequence[dict[str, str]]
    ) -> None:
        """Marks a fragment of `images` images done, with its rows and failed images (rows of `ERROR_SCHEMA`)."""
        table = pa.Table.from_pylist(list(records), schema=self.schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        part = _part(fragment)
        files.write_bytes(self._path("labels", part), buffer.getvalue())
        entry = {
            "part": part,
            "images": images,
            "labelled": images - len(errors),
            "errors": list(errors),
            "rows": len(records),
            "instances": dict(Counter(record["task"] for record in records if record.get("box") is not None)),
        }
        self._write_json(self._entry(fragment), entry)

    def done(self) -> set[int]:
        """The numbers of the finished fragments."""
        if not files.is_dir(self.folder):
            return set()
        names = files.list_files(self.folder, (".json",))
        return {int(match[1]) for name in names if (match := _ENTRY.fullmatch(name))}

    def entry(self, fragment: int) -> dict[str, Any] | None:
        """What is recorded of a fragment; None if it is not done."""
        path = self._entry(fragment)
        return json.loads(files.read_text(path)) if files.is_file(path) else None

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, entry) of the finished fragments, in order."""
        done = sorted(self.done())
        for start in range(0, len(done), 512):
            block = done[start : start + 512]
            for fragment, data in zip(block, files.read_many([self._entry(f) for f in block]), strict=True):
                if isinstance(data, UserError):
                    raise data
                yield fragment, json.loads(data)

    def totals(self) -> dict[str, Any]:
        """``images``, ``labelled``, ``errors``, ``fragments``, ``instances`` (task -> count), ``reasons`` (of errors ->
        count) and ``first_error`` of all finished fragments."""
        sums: Counter[str] = Counter(images=0, labelled=0, errors=0, fragments=0)
        instances: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        first: dict[str, str] | None = None
        for fragment, entry in self.entries():
            errors = entry["errors"]
            sums.update(images=entry["images"], labelled=entry["labelled"], errors=len(errors), fragments=1)
            instances.update(entry["instances"] if "instances" in entry else self._instances(fragment))
            reasons.update(error["reason"] for error in errors)
            first = first or (errors[0] if errors else None)
        return {**sums, "instances": dict(instances), "reasons": dict(reasons), "first_error": first}

    def write_errors(self) -> str:
        """Gathers the failed images of all finished fragments in ``errors.parquet``; returns its place."""
        path = self._path("errors.parquet")
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, ERROR_SCHEMA) as writer:
            for _, entry in self.entries():
                if entry["errors"]:
                    writer.write_table(pa.Table.from_pylist(entry["errors"], schema=ERROR_SCHEMA))
        files.write_bytes(path, buffer.getvalue())
        return path

    def tables(self) -> Iterator[pa.Table]:
        """The label table of each finished fragment, in order."""
        for fragment in sorted(self.done()):
            yield self.table(fragment)

    def table(self, fragment: int) -> pa.Table:
        """The label table of a finished fragment."""
        path = self._path("labels", _part(fragment))
        with files.as_user_error(path), files.open_input(path) as file:
            return _with_all_columns(pq.ParquetFile(file).read(), self.schema)

    def items(self) -> Iterator[Item]:
        """The images of all finished fragments, failed ones included, in order."""
        done = self.done()
        for fragment in self.plan().fragments():
            if fragment.index in done:
                yield from fragment.items

    def _instances(self, fragment: int) -> Counter[str]:
        """Of a fragment from before they were recorded in the entry."""
        table = self.table(fragment)
        return Counter(table.filter(table["box"].is_valid())["task"].to_pylist())

    def _path(self, *names: str) -> str:
        return urls.join(self.output, *names)

    def _entry(self, fragment: int) -> str:
        return urls.join(self.folder, f"{fragment:06d}.json")

    def _write_json(self, path: str, data: Any) -> None:
        files.write_bytes(path, json.dumps(data, indent=1, sort_keys=True).encode())


def _with_all_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with nulls in the columns that it lacks, as one from before they were introduced."""
    for column in schema:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
    return table


def _part(fragment: int) -> str:
    return f"part-{fragment:06d}.parquet"


def _short(before: Any, after: Any) -> tuple[str, str]:
    """Two values as text, cut to what tells them apart."""
    texts = [json.dumps(before), json.dumps(after)]
    if max(map(len, texts)) > 60:
        first = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        start = max(0, first - 20)
        texts = ["..." * (start > 0) + text[start : start + 54] + "..." * (len(text) > start + 54) for text in texts]
    return texts[0], texts[1]


def is_batch(settings: Mapping[str, Any]) -> bool:
    """Whether these are the settings of a job that answers a batch file (see `label.batch`)."""
    return "batch" in settings


def open_finished(output: urls.Location, of_images: bool = True) -> Ledger:
    """The ledger of a labelled folder; raises `UserError` if `output` is not one or, with `of_images`, if it holds the
    answers to a batch file."""
    ledger = Ledger(output)
    settings = ledger.settings()
    if of_images and settings is not None and is_batch(settings):
        raise UserError(
            f"'{urls.shown(output)}' holds the answers to a batch file, in output.jsonl; give a folder with labels of "
            "images",
            "not_labelled",
        )
    if settings is None:
        raise UserError(
            f"'{urls.shown(output)}' is not an output folder of `lumen-ray label`; give one", "not_labelled"
        )
    return ledger
