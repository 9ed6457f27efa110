"""Writes shard folders from any source, in parallel on Ray: one task per output file, a pure function of its records.

So the files do not depend on how many tasks ran at once. They are written into a staging folder below the output and
moved into place when all are complete, under names that existing shards do not use; then the manifest is replaced and
files it no longer lists are removed. A killed job leaves either the old shards or the new ones complete; only the list
of rejected records, which is written just before the manifest, may be new beside old shards.

Each job has its own staging folder, so two jobs with one output do not touch each other's files until they publish:
without `overwrite` the later one then fails, with it the later one replaces the earlier. The seconds of publishing are
not guarded. The staging folder of a killed job is removed by the next job that finds it unchanged for a day (if the
store keeps modification times; otherwise it stays).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumen_ray.data import files, urls
from lumen_ray.data.shards import rejections, shards
from lumen_ray.data.sources.base import Listing, Rejected, Source
from lumen_ray.errors import UserError

Progress = Callable[[int, int], None]  # records done, records in all
Unit = dict[str, Any]  # {"number", "records", "payload"}: the records of one output file
ROWS_PER_FILE = 512
_STAGING = ".staging"  # prefix of staging folders
_ABANDONED = 24 * 3600  # seconds without a change after which a staging folder is abandoned


def prepare_source(
    output: urls.Location,
    source: Source,
    *,
    shuffle_seed: int = 0,
    rows_per_group: int = shards.ROWS_PER_GROUP,
    rows_per_file: int = ROWS_PER_FILE,
    overwrite: bool = False,
    max_rejected: str | float | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes all rows of `source` into the shard folder `output` (local or a URL); returns a summary.

    Rows are shuffled once with `shuffle_seed`. Records that cannot be used go to `rejected.parquet` with a reason; per
    kind of record, the input is the sum of those written and rejected. `max_rejected`: largest share of any kind of
    record, in percent, that may be rejected (None: any). `workers`: maximal number of concurrent tasks (None: as the
    cluster allows, 0: in this process, without Ray). Raises `UserError` for invalid arguments, if no row can be
    written, if more is rejected than `max_rejected`, and if the output already contains shards, unless `overwrite`.
    """
    limit = rejections.RejectedLimit(max_rejected)
    limits = (("rows_per_group", rows_per_group, 1), ("rows_per_file", rows_per_file, 1), ("workers", workers, 0),
              ("shuffle_seed", shuffle_seed, 0))  # fmt: skip
    for name, value, least in limits:
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}", "invalid_config")
    output = urls.absolute(output)
    _check_output(output, overwrite)
    listing = source.read_listing()
    if not listing.records:
        first = f"; the first record: {rejections.describe(listing.rejected[0])}" if listing.rejected else ""
        raise UserError(f"the {source.kind} input lists no {source.row_kind} that can be used{first}", "empty_input")
    limit.check_listing(listing)
    staging = urls.join(output, f"{_STAGING}-{uuid.uuid4().hex[:12]}")
    files.make_folder(staging)
    try:
        for name in files.idle_folders(output, _STAGING, _ABANDONED):
            files.remove_folder(urls.join(output, name))
        writer = _Writer(source, listing.shared, staging, rows_per_group, rows_per_file, shuffle_seed, _window(listing))
        units = _units(listing, rows_per_file, shuffle_seed)
        results = _write_units(units, writer, workers, progress, limit.watch(listing))
        rejected = [*listing.rejected, *(record for result in results for record in result["rejected"])]
        entries = [entry for result in results for entry in result["entries"]]
        counts = _count(source, listing, results, rejected)
        if not entries:
            raise UserError(rejections.no_row_message(source, counts, rejected), "empty_input")
        limit.check(counts, rejected)
        rejections.check_unknown(counts, rejected)
        _check_ids(results, staging)
        origin = {"kind": source.kind, "shuffle_seed": shuffle_seed, **source.settings(), **listing.origin}
        changed = shards.Changes()
        for result in results:
            changed.merge(result["changed"], result["changed_in"])
        manifest = shards.build_manifest(
            entries, categories=listing.categories, counts=counts, changed=changed, origin=origin, notes=listing.notes
        )
        _check_output(output, overwrite)  # another job may have published meanwhile
        _publish(output, staging, manifest, rejected)
    finally:
        files.remove_folder(staging)
        files.remove_empty_folder(output)  # if nothing was written
    size = sum(entry["bytes"] for entry in entries)
    summary = {key: manifest[key] for key in ("rows", "tasks", "counts", "rejected", "changed", "untrained", "notes")}
    return {
        "output": urls.shown(output),
        "files": len(entries),
        "bytes": size,
        **summary,
        "rules": rejections.by_rule(rejected),
    }


def _check_ids(results: Sequence[dict[str, Any]], folder: str) -> None:
    """Raises `UserError` if two rows of the files in `folder` have one `image_id`.

    Sources make them unique, unless names of the input look like the numbers that they append.
    """
    hashes = np.concatenate([np.array(result["ids"], np.uint64) for result in results])
    values, numbers = np.unique(hashes, return_counts=True)
    if len(values) == len(hashes):
        return
    repeated = set(values[numbers > 1].tolist())
    for entry in (entry for result in results for entry in result["entries"]):
        with shards.open_file(folder, entry["path"]) as file:
            for name in file.read(columns=["image_id"])["image_id"].to_pylist():
                if _id_hash(name) in repeated:
                    raise UserError(
                        f"two rows have the image id '{name}'; rename one of the images, or prepare them separately",
                        "repeated_image",
                    )


def _check_output(output: str, overwrite: bool) -> None:
    if files.is_file(output):
        raise UserError(f"output '{urls.shown(output)}' is a file; give a folder", "invalid_output")
    if files.exists(urls.join(output, shards.MANIFEST)) and not overwrite:
        raise UserError(
            f"'{urls.shown(output)}' already holds shards; give another output folder, or --overwrite to replace them",
            "output_exists",
        )


def _window(listing: Listing) -> bool:
    """Whether rows must be shuffled while writing, because a record gives many consecutive ones."""
    return listing.shuffle and listing.rows_per_record > 1


def _units(listing: Listing, rows_per_file: int, shuffle_seed: int) -> list[Unit]:
    """The records in shuffled order, split into one unit per output file."""
    number = len(listing.records)
    order = np.random.default_rng(shuffle_seed).permutation(number) if listing.shuffle else range(number)
    step = max(1, rows_per_file // max(1, listing.rows_per_record))
    chunks = [[listing.records[i] for i in order[first : first + step]] for first in range(0, number, step)]
    return [{"number": i, "records": len(c), "payload": json.dumps(c)} for i, c in enumerate(chunks)]


@dataclass
class _Writer:
    """Writes the rows of one unit; small, since it is pickled into every task."""

    source: Source
    shared: Any
    folder: str
    rows_per_group: int
    rows_per_file: int
    shuffle_seed: int
    window: bool

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Writes the unit. Returns the manifest entries of its files (more than one if its records give more rows than
        a file holds), its rejected records and its counts per kind."""
        rejected: list[Rejected] = []
        came_in: Counter[str] = Counter()
        written: Counter[str] = Counter()
        changed = shards.Changes()
        ids: list[int] = []

        def rows() -> Iterator[dict[str, Any]]:
            for record in _loaded(unit["payload"]):
                for outcome in self.source.rows(record, self.shared):
                    rejected.extend(outcome.rejected)
                    came_in.update(outcome.came_in)
                    written.update(outcome.written)
                    changed.add(outcome.changed, outcome.row)
                    if outcome.row is not None:
                        ids.append(_id_hash(outcome.row["image_id"]))
                        yield outcome.row

        stream = self._shuffled(rows(), unit["number"]) if self.window else rows()
        entries = list(self._files(stream, unit["number"]))
        written[self.source.row_kind] += sum(entry["rows"] for entry in entries)
        return {
            "number": unit["number"],
            "records": unit["records"],
            "entries": entries,
            "rejected": rejected,
            "came_in": came_in,
            "written": written,
            "changed": changed.numbers,
            "changed_in": changed.images,
            "ids": ids,
        }

    def _files(self, rows: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
        part = 0
        row = next(rows, None)
        while row is not None:
            name = f"part-{number:05d}.parquet" if part == 0 else f"part-{number:05d}-{part:03d}.parquet"
            with shards.ShardWriter(self.folder, name, self.rows_per_group) as writer:
                for _ in range(self.rows_per_file):
                    writer.write(row)
                    if (row := next(rows, None)) is None:
                        break
            assert writer.entry is not None, "it has written a row"
            yield writer.entry
            part += 1

    def _shuffled(self, rows: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
        """The rows in random order, drawn from a window of as many rows as a file holds."""
        rng = np.random.default_rng((self.shuffle_seed, number))
        window: list[dict[str, Any]] = []
        for row in rows:
            window.append(row)
            if len(window) > self.rows_per_file:
                chosen = int(rng.integers(len(window)))
                window[chosen], window[-1] = window[-1], window[chosen]
                yield window.pop()
        yield from (window[i] for i in rng.permutation(len(window)))


def _loaded(payload: str) -> list[Any]:
    try:
        return json.loads(payload)
    except RecursionError:
        raise UserError("a record is nested too deeply to be read", "invalid_annotations") from None


def _id_hash(image_id: str) -> int:
    digest = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _write_units(
    units: list[Unit],
    write: Callable[[Unit], dict[str, Any]],
    workers: int | None,
    progress: Progress | None,
    watch: Callable[[Sequence[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """The results of all units in order, computed in this process (`workers=0`) or by Ray Data tasks; `watch` is called
    with those so far after each."""
    total, done, results = sum(unit["records"] for unit in units), 0, []
    for result in map(write, units) if workers == 0 else _write_on_ray(units, write, workers):
        done += result["records"]
        results.append(result)
        watch(results)
        if progress is not None:
            progress(done, total)
    return sorted(results, key=lambda result: result["number"])


def _write_on_ray(
    units: list[Unit], write: Callable[[Unit], dict[str, Any]], workers: int | None
) -> Iterator[dict[str, Any]]:
    from lumen_ray import ray_env

    ray_env.prepare_environment()
    import ray

    if not ray.is_initialized():
        ray_env.init_local()

    def write_batch(batch: dict[str, Any]) -> dict[str, Any]:
        # as json, since nested, sometimes empty lists have no fixed Arrow type
        fields = zip(batch["number"], batch["records"], batch["payload"], strict=True)
        try:
            written = [write({"number": int(n), "records": int(r), "payload": str(p)}) for n, r, p in fields]
        except UserError as error:  # as a value, since Ray would wrap the exception
            written = [{"error": str(error), "reason": error.reason}]
        return {"result": [json.dumps(result) for result in written]}

    size = None if workers is None else min(workers, len(units))
    blocks = ray.data.from_items(units, override_num_blocks=len(units))
    results = blocks.map_batches(write_batch, batch_size=1, compute=ray.data.TaskPoolStrategy(size=size))
    for row in results.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise UserError(result["error"], result["reason"])
        yield result


def _count(
    source: Source, listing: Listing, results: list[dict[str, Any]], rejected: Sequence[Rejected]
) -> dict[str, dict[str, int]]:
    """Input, written and rejected records per kind, counted separately so that `build_manifest` can check the sum."""
    came_in: Counter[str] = Counter(listing.inputs)
    written: Counter[str] = Counter({source.row_kind: 0})
    for result in results:
        came_in.update(result["came_in"])
        written.update(result["written"])
    counts = rejections.count_records(came_in, written, rejected)
    return {source.row_kind: counts[source.row_kind]} | counts  # rows first


def _publish(output: str, staging: str, manifest: dict[str, Any], rejected: list[Rejected]) -> None:
    """Moves the staged files into place, then replaces the manifest, then removes the files that it does not list."""
    before = _existing_files(output)
    placed = [{**entry, "path": _free_name(entry, before)} for entry in manifest["files"]]
    for entry, target in zip(manifest["files"], placed, strict=True):
        files.move(urls.join(staging, entry["path"]), urls.join(output, target["path"]))
    shards.write_rejected(output, rejected)
    shards.write_manifest(output, manifest | {"files": placed})
    named = {entry["path"] for entry in placed}
    for name in files.list_files(output, [".parquet"]):
        if name.startswith("part-") and name not in named:
            files.remove(urls.join(output, name))


def _existing_files(output: str) -> dict[str, str]:
    """Checksums by name of the files of existing shards; empty if there are none or the manifest cannot be read."""
    try:
        return {entry["path"]: entry["sha256"] for entry in shards.read_manifest(output)["files"]}
    except files.StoreError:
        raise
    except UserError:
        return {}


def _free_name(entry: dict[str, Any], before: dict[str, str]) -> str:
    """The file's name, with its checksum appended if an existing file of other content has that name."""
    name, digest = entry["path"], entry["sha256"]
    return name if before.get(name, digest) == digest else f"{urls.stem(name)}-{digest[:12]}.parquet"
