"""Records which fragments of the input are done. A job killed anywhere resumes without duplicates or gaps.

`plan.py` cuts the input into fragments. A fragment's labels are written to ``labels/part-N.parquet``, then its entry to
``ledger/N.json``; each appears whole or not at all, in a folder or a bucket, and only the entry marks the fragment as
done. A file of labels without an entry is overwritten by the next run; readers take the valid files from the ledger.
Where failed images are asked again (`retries.py`), the fragment's labels with theirs go to a file of another name, and
its entry is replaced. The processes of a job share the folder and nothing else.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError
from lumen_ray.inference.records import ERROR_SCHEMA, LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.plan import Plan

_ENTRY = re.compile(r"(\d+)\.json")
_PART = re.compile(r"part-(\d+)(?:-\d+)?\.parquet")


class Ledger:
    """The ledger of one output folder, local or in a bucket. `schema`: of the rows that are published; `round`: images
    that failed in an earlier round are asked again, 0: none are."""

    def __init__(self, output: urls.Location, schema: pa.Schema = LABEL_SCHEMA, round: int = 0):
        self.output, self.schema, self.round = urls.absolute(output), schema, round
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
        names: dict[int, list[str]] = {}
        for name in files.list_files(folder, (".parquet",)):
            if match := _PART.fullmatch(name):
                names.setdefault(int(match[1]), []).append(name)
        done = self.done()
        for fragment, found in names.items():
            if fragment in done and len(found) == 1:
                continue  # the entry need not be read
            entry = self.entry(fragment) or {"part": ""}
            for name in found:
                if name != entry["part"]:
                    files.remove(urls.join(folder, name))

    def settings(self) -> dict[str, Any] | None:
        """The settings of the job; None for a folder without one."""
        path = self._path("job.json")
        return json.loads(files.read_text(path)) if files.is_file(path) else None

    def publish(
        self,
        fragment: int,
        images: int,
        records: Sequence[dict[str, Any]],
        errors: Sequence[dict[str, str]],
        order: Sequence[str] = (),
    ) -> None:
        """Marks a fragment of `images` images done, with its rows and failed images (rows of `ERROR_SCHEMA`).

        Of a fragment that was done in an earlier round, these are its images that had failed; the rows of the others
        stay, and all are put in the `order` of these image ids.
        """
        table = pa.Table.from_pylist(list(records), schema=self.schema)
        copied = _copied(table)
        entry: dict[str, Any] = {}
        before = self.entry(fragment) if self.round else None
        if self.round:
            entry = {"round": self.round, "asked": {"images": images, "copied": copied}}
        if before is not None:
            asked = {row["image_id"] for row in [*records, *errors]}  # of which a worker that died may have rows here
            table = _in_order(pa.concat_tables([_without(self.table(fragment), asked), table]), order)
            images, copied = before["images"], _copied(table)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        part = _part(fragment, self.round)
        files.write_bytes(self._path("labels", part), buffer.getvalue())
        entry |= {
            "part": part,
            "images": images,
            "labelled": images - len(errors),
            "errors": list(errors),
            "rows": len(table),
            "copied": copied,
            "instances": _instances(table),
        }
        self._write_json(self._entry(fragment), entry)
        if before is not None and before["part"] != part:
            files.remove(self._path("labels", before["part"]))

    def asks_again(self, entry: Mapping[str, Any]) -> bool:
        """Whether images of a fragment with this entry are to be asked again in this round."""
        return bool(entry["errors"]) and entry.get("round", 0) < self.round

    def failed(self) -> dict[int, int]:
        """The finished fragments with images that are to be asked again, and the number of these."""
        return {f: len(entry["errors"]) for f, entry in self.entries() if self.asks_again(entry)} if self.round else {}

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
        """``images``, ``labelled``, ``copied`` (of those, from an image with the same bytes), ``errors``,
        ``fragments``, ``instances`` (task -> count), ``reasons`` (of errors -> count) and ``first_error`` of all
        finished fragments."""
        return self._sum(self.entries())

    def _sum(self, entries: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        sums: Counter[str] = Counter(images=0, labelled=0, copied=0, errors=0, fragments=0)
        instances: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        first: dict[str, str] | None = None
        for fragment, entry in entries:
            errors = entry["errors"]
            sums.update(images=entry["images"], labelled=entry["labelled"], errors=len(errors), fragments=1)
            sums["copied"] += entry.get("copied", 0)  # absent in older entries
            instances.update(entry["instances"] if "instances" in entry else _instances(self.table(fragment)))
            reasons.update(error["reason"] for error in errors)
            first = first or (errors[0] if errors else None)
        return {**sums, "instances": dict(instances), "reasons": dict(reasons), "first_error": first}

    def write_errors(self) -> tuple[dict[str, Any], str]:
        """Gathers the failed images of all finished fragments in ``errors.parquet``; returns `totals` and its place.
        Each entry is read once."""
        path = self._path("errors.parquet")
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, ERROR_SCHEMA) as writer:

            def written() -> Iterator[tuple[int, dict[str, Any]]]:
                for fragment, entry in self.entries():
                    if entry["errors"]:
                        writer.write_table(pa.Table.from_pylist(entry["errors"], schema=ERROR_SCHEMA))
                    yield fragment, entry

            totals = self._sum(written())
        files.write_bytes(path, buffer.getvalue())
        return totals, path

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The label table of each finished fragment, or these columns of it, in order."""
        for fragment in sorted(self.done()):
            yield self.table(fragment, columns)

    def table(self, fragment: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The label table of a finished fragment, or these columns of it. Raises `UserError` if it cannot be read."""
        part = self._part_of(fragment)
        try:
            return self._read(fragment, part, columns)
        except UserError:
            # a job that asks failed images again may have replaced the file since its name was read
            if (now := self._part_of(fragment)) == part:
                raise
            return self._read(fragment, now, columns)

    def _part_of(self, fragment: int) -> str:
        entry = self.entry(fragment)
        return entry["part"] if entry else _part(fragment)

    def _read(self, fragment: int, part: str, columns: Sequence[str] | None) -> pa.Table:
        path = self._path("labels", part)
        try:
            with files.as_user_error(path), files.open_input(path) as file:
                wanted = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
                return _with_all_columns(pq.ParquetFile(file).read(wanted.names), wanted)
        except pa.ArrowException as error:
            entry = urls.shown(self._entry(fragment))
            raise UserError(
                f"'{urls.shown(path)}' is damaged ({str(error).splitlines()[0]}); remove '{entry}' and label again",
                "unreadable_file",
            ) from None

    def items(self) -> Iterator[Item]:
        """The images of all finished fragments, failed ones included, in order."""
        done = self.done()
        for fragment in self.plan().fragments():
            if fragment.index in done:
                yield from fragment.items

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
    return table.select(schema.names)


def _in_order(table: pa.Table, order: Sequence[str]) -> pa.Table:
    """The rows by the place of their image in `order`, if it is given; those of one image as they were."""
    if not order:
        return table
    place = {image_id: number for number, image_id in enumerate(order)}
    images = table["image_id"].to_pylist()
    return table.take(sorted(range(len(images)), key=lambda row: place[images[row]])) if images else table


def _without(table: pa.Table, image_ids: Collection[str]) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["image_id"], pa.array(sorted(image_ids), pa.string()))))


def _instances(table: pa.Table) -> dict[str, int]:
    """task -> rows with a box; empty for rows of another kind."""
    if "box" not in table.column_names:
        return {}
    return dict(Counter(table.filter(table["box"].is_valid())["task"].to_pylist()))


def _copied(table: pa.Table) -> int:
    """The images with the labels of another one."""
    if "duplicate_of" not in table.column_names:
        return 0
    return len(table.filter(table["duplicate_of"].is_valid())["image_id"].unique())


def _part(fragment: int, round: int = 0) -> str:
    return f"part-{fragment:06d}-{round}.parquet" if round else f"part-{fragment:06d}.parquet"


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
    if settings is None and files.is_dir(ledger.folder):
        raise UserError(
            f"the job in '{urls.shown(output)}' was only just begun and has labelled nothing yet; wait for it if it is "
            "still starting, else run its command again",
            "not_labelled",
        )
    if settings is None and not files.exists(output):
        raise UserError(
            f"'{urls.shown(output)}' does not exist; a job that is still starting, or was stopped before it began, "
            "has no output folder yet",
            "not_labelled",
        )
    if settings is None:
        raise UserError(
            f"'{urls.shown(output)}' is not an output folder of `lumen-ray label`; give one", "not_labelled"
        )
    return ledger
