"""Shard folders, local or in a bucket: Parquet files of rows (`shards.schema`) and a manifest of their contents.

The manifest lists the row groups of each file with their rows per task, so that a training plan can be made without
opening a file. Files and manifest appear complete or not at all: each is written elsewhere and moved into place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.data.shards.schema import LINKED_SCHEMA, REJECTED_SCHEMA, SCHEMA, with_new_fields
from lumen_ray.errors import UserError
from lumen_ray.structures import Size

MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
SCHEMA_VERSION = 1
ROWS_PER_GROUP = 32
_NAMED_IMAGES = 5  # of each change, in the manifest


class ShardWriter:
    """Writes rows to one Parquet file. A context manager: the file is moved into place on success and dropped on error.

    with ShardWriter(folder, "part-00000.parquet", rows_per_group=32) as writer:
        writer.write(row)
    writer.entry   # the file's entry in the manifest

    Raises `UserError` (`disk_full`, `invalid_output`) if the file cannot be written.
    """

    def __init__(self, folder: urls.Location, name: str, rows_per_group: int = ROWS_PER_GROUP):
        if rows_per_group < 1:
            raise UserError(f"rows_per_group must be at least 1, got {rows_per_group}", "invalid_config")
        self.folder, self.name = urls.absolute(folder), name
        self.rows_per_group = rows_per_group
        self.entry: dict[str, Any] | None = None
        self._partial: Path | None = None  # the unfinished file, in a local folder of its own
        self._pending: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._class_images: Counter[str] = Counter()
        self._untrained = 0
        self._links = 0
        self._schema = SCHEMA
        self._writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row of `schema.make_row`."""
        self._pending.append(row)
        if len(self._pending) == self.rows_per_group:
            self._flush()

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        links = sum(len(message.get("links") or ()) for row in rows for message in row["messages"])
        if self._partial is None:
            files.make_folder(self.folder)
            self._partial = _temporary_folder(self.folder) / self.name
        with files.as_user_error(self._partial, "written"):
            if links and self._schema is not LINKED_SCHEMA:
                self._begin_links(self._partial)
            self._write_group(self._partial, rows)
        tasks = Counter(task for row in rows for task in set(row["tasks"]))
        sources = Counter(row["source"] for row in rows)
        self._untrained += sum(not row["tasks"] for row in rows)
        self._links += links
        counts = {"tasks": dict(sorted(tasks.items())), "sources": dict(sorted(sources.items()))}
        self._groups.append({"rows": len(rows), **counts, "sizes": _sizes_text(rows)})
        self._class_images.update(name for row in rows for name in {i["phrase"] for i in row["instances"]})

    def _write_group(self, partial: Path, rows: list[dict[str, Any]]) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                partial,
                self._schema,
                compression="zstd",
                use_dictionary=["source"],  # a dictionary of image bytes would only cost time
                write_statistics=["image_id"],
            )
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema), row_group_size=len(rows))

    def _begin_links(self, partial: Path) -> None:
        """Gives the file the columns of links; groups that were written without are written again."""
        self._schema = LINKED_SCHEMA
        if self._writer is None:
            return
        self._finish(self._writer)
        before = partial.with_suffix(".before")
        partial.rename(before)
        with pq.ParquetFile(before) as file:
            for index in range(file.num_row_groups):
                self._write_group(partial, file.read_row_group(index).to_pylist())
        before.unlink()

    def close(self) -> dict[str, Any] | None:
        """Finishes the file; returns its manifest entry, or None (and no file) if no row was written."""
        if self._pending:
            self._flush()
        if self._writer is None or self._partial is None:
            return None
        partial = self._partial
        with files.as_user_error(partial, "written"):
            self._finish(self._writer)
        self.entry = {
            "path": self.name,
            "rows": sum(group["rows"] for group in self._groups),
            "row_groups": self._groups,
            "bytes": partial.stat().st_size,
            "sha256": sha256(partial),
            "class_images": dict(sorted(self._class_images.items())),
            "untrained": self._untrained,
        } | ({"links": self._links} if self._links else {})
        files.put(partial, urls.join(self.folder, self.name))
        self._drop()
        return self.entry

    def _finish(self, writer: pq.ParquetWriter) -> None:
        """Writes the end of the file. If that fails, it is not tried again when the writer is garbage-collected."""
        self._writer = None
        try:
            writer.close()
        except OSError:
            writer.is_open = False
            raise

    def _drop(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # e.g. a full disk, which has been reported
                self._finish(self._writer)
        if self._partial is not None:
            shutil.rmtree(self._partial.parent, ignore_errors=True)
            self._partial = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._drop()


def _sizes_text(rows: Iterable[dict[str, Any]]) -> str:
    """The image sizes in row order, as WIDTHxHEIGHT: one line of the manifest per row group."""
    return " ".join("-" if row["image"] is None else f"{row['width']}x{row['height']}" for row in rows)


def row_sizes(group: dict[str, Any]) -> list[Size | None]:
    """(height, width) of each row's image in a row group of the manifest, None for rows without one."""
    if "sizes" not in group:
        raise UserError(
            "the shards were written without image sizes, which 'buckets' of several sizes need; prepare them again",
            "old_shards",
        )
    sizes = (None if text == "-" else text.split("x") for text in group["sizes"].split())
    return [size and (int(size[1]), int(size[0])) for size in sizes]


def _temporary_folder(folder: str) -> Path:
    """A local folder for unfinished files, below `folder` if that is local, so that they can be renamed."""
    place = tempfile.gettempdir() if urls.is_url(folder) else folder
    with files.as_user_error(place, "written"):
        return Path(tempfile.mkdtemp(prefix=".partial-", dir=place))


def sha256(location: urls.Location) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with files.open_input(location) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass
class Changes:
    """Parts of written records that were cut or dropped: how many by change, and the first images of each."""

    numbers: Counter[str] = field(default_factory=Counter)
    images: dict[str, list[str]] = field(default_factory=dict)

    def add(self, changed: Mapping[str, int], row: Mapping[str, Any] | None) -> None:
        """Counts the changes of one row; None: of records that no row holds."""
        self.numbers.update(changed)
        if row is not None:
            self._name({change: [row["image_id"]] for change, number in changed.items() if number})

    def merge(self, numbers: Mapping[str, int], images: Mapping[str, Sequence[str]]) -> None:
        """Adds the changes of later rows."""
        self.numbers.update(numbers)
        self._name(images)

    def _name(self, images: Mapping[str, Sequence[str]]) -> None:
        for change, names in images.items():
            known = self.images.setdefault(change, [])
            known += names[: _NAMED_IMAGES - len(known)]


def build_manifest(
    files: Iterable[dict[str, Any]],
    *,
    categories: Sequence[dict[str, Any]] = (),
    counts: dict[str, dict[str, int]] | None = None,
    changed: Changes | None = None,
    origin: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest of finished files (entries of `ShardWriter`).

    `categories`: ``{"name", "keypoints": [names], "skeleton": [[i, j], ...]}``, 0-based; `counts`: input records per
    kind, e.g. ``{"images": {"in": 10, "written": 9, "rejected": 1}}``; `changed` becomes
    ``"changed": {"boxes clipped": 2}, "changed_in": {"boxes clipped": ["a.jpg"]}``; `origin`: the settings used;
    `notes`: sentences about how the input was read. A category gets `images`, the number of rows that contain it, by
    which training draws absent classes; `untrained` is the number of rows without any task; `links`, where there are
    any, that of links in texts. Raises `RuntimeError` if the counts do not add up, i.e. a source has lost records.
    """
    files = [dict(file) for file in files]
    class_images: Counter[str] = Counter()
    untrained = links = 0
    for file in files:
        class_images.update(file.pop("class_images", {}))
        untrained += file.pop("untrained", 0)
        links += file.pop("links", 0)
    tasks: Counter[str] = Counter()
    for group in (group for file in files for group in file["row_groups"]):
        tasks.update(group["tasks"])
    counts, changed = counts or {}, changed or Changes()
    for kind, count in counts.items():
        if count["in"] != count["written"] + count["rejected"]:
            raise RuntimeError(
                f"{kind} do not add up: {count['in']} came in, {count['written']} were written and "
                f"{count['rejected']} rejected"
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": sum(file["rows"] for file in files),
        "tasks": dict(sorted(tasks.items())),
        "categories": [{**category, "images": class_images[category["name"]]} for category in categories],
        "counts": counts,
        "rejected": sum(count["rejected"] for count in counts.values()),
        "changed": dict(sorted(changed.numbers.items())),
        "changed_in": dict(sorted(changed.images.items())),
        "untrained": untrained,
        **({"links": links} if links else {}),
        "notes": list(notes),
        "origin": origin or {},
        "files": files,
    }


def write_manifest(folder: urls.Location, manifest: dict[str, Any]) -> str:
    """Writes `manifest` into the folder, atomically; returns its location."""
    location = urls.join(urls.absolute(folder), MANIFEST)
    files.write_bytes(location, (json.dumps(manifest, indent=1) + "\n").encode())
    return location


def read_manifest(folder: urls.Location) -> dict[str, Any]:
    """The manifest of a shard folder. Raises `UserError` (`not_shards`) if it is not a shard folder."""
    location = urls.join(urls.absolute(folder), MANIFEST)
    if not files.is_file(location):
        why = "does not exist" if not files.exists(folder) else f"has no {MANIFEST}"
        raise UserError(
            f"'{urls.shown(folder)}' {why}; give a folder that `lumen-ray prepare` has written", "not_shards"
        )
    try:
        manifest = json.loads(files.read_bytes(location))
        version = manifest["schema_version"]
        manifest["files"], manifest["tasks"], manifest["categories"]  # noqa: B018  all three must exist
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(
            f"'{urls.shown(location)}' is not a shard manifest; run `lumen-ray prepare` again", "not_shards"
        ) from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"'{urls.shown(location)}' has schema version {version}, not {SCHEMA_VERSION}; "
            "run `lumen-ray prepare` again",
            "not_shards",
        )
    return manifest


def open_file(folder: urls.Location, file: str) -> pq.ParquetFile:
    """Opens a Parquet file listed in the manifest. Raises `UserError` (`broken_shards`) if it is missing or damaged.

    A context manager. Of a file in a bucket, only the columns and row groups that are read are fetched.
    """
    location = urls.join(urls.absolute(folder), file)
    remote = urls.is_url(location)
    try:
        # a local path instead of an open file, so that Arrow reads ahead and closes it
        source = files.open_input(location) if remote else files.filesystem(location)[1]
        return pq.ParquetFile(source, pre_buffer=remote)
    except files.StoreError:
        raise
    except FileNotFoundError:
        why = "missing"
    except UserError as error:
        why = "missing" if error.reason == "missing_file" else f"unreadable ({error})"
    except (pa.ArrowInvalid, OSError) as error:
        why = f"damaged ({str(error).splitlines()[0]})"
    raise UserError(f"shard file '{urls.shown(location)}' is {why}; run `lumen-ray prepare` again", "broken_shards")


def read_row_group(
    folder: urls.Location, file: str, index: int, rows: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The rows of row group `index` of a file listed in the manifest: all, or those with the numbers `rows`, in that
    order, possibly repeated.

    Raises `UserError` (`broken_shards`) if the file is damaged.
    """
    with open_file(folder, file) as parquet:
        if not 0 <= index < parquet.num_row_groups:
            raise UserError(
                f"shard file '{file}' has {parquet.num_row_groups} row groups, none with number {index}",
                "broken_shards",
            )
        table = _read_group(parquet, index, file)
        if rows is not None and max(rows, default=-1) >= len(table):
            wrong = f"row group {index} of shard file '{file}' has {len(table)} rows, the manifest says more"
            raise UserError(f"{wrong}; run `lumen-ray prepare` again", "broken_shards")
        if rows is not None and list(rows) != list(range(len(table))):
            table = table.take(list(rows))
        return [with_new_fields(row) for row in table.to_pylist()]


def read_rows(folder: urls.Location, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """All rows of a shard folder in the manifest's order, one row group in memory at a time; `columns` None: all."""
    for entry in read_manifest(folder)["files"]:
        with open_file(folder, entry["path"]) as parquet:
            for index in range(parquet.num_row_groups):
                for row in _read_group(parquet, index, entry["path"], columns).to_pylist():
                    yield with_new_fields(row, columns)


def _read_group(parquet: pq.ParquetFile, index: int, file: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return parquet.read_row_group(index, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"row group {index} of shard file '{file}' cannot be read ({str(error).splitlines()[0]}); run `lumen-ray "
            "prepare` again",
            "broken_shards",
        ) from None


def verify(folder: urls.Location) -> list[str]:
    """The problems of a shard folder, one sentence each; empty if files, sizes, checksums and rows agree."""
    problems = []
    for entry in read_manifest(folder)["files"]:
        location = urls.join(urls.absolute(folder), entry["path"])
        if not files.is_file(location):
            problems.append(f"{entry['path']} is missing")
        elif (size := files.size(location)) != entry["bytes"]:
            problems.append(f"{entry['path']} has {size} bytes, the manifest says {entry['bytes']}")
        elif sha256(location) != entry["sha256"]:
            problems.append(f"{entry['path']} does not match its checksum")
        else:
            with open_file(folder, entry["path"]) as parquet:
                groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            if groups != [group["rows"] for group in entry["row_groups"]]:
                problems.append(f"{entry['path']} has row groups of {groups} rows, the manifest says otherwise")
    return problems


def write_rejected(folder: urls.Location, records: Sequence[dict[str, str]]) -> None:
    """Writes `rejected.parquet` (`schema.REJECTED_SCHEMA`), even if nothing was rejected."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(records), schema=REJECTED_SCHEMA), buffer, compression="zstd")
    files.write_bytes(urls.join(urls.absolute(folder), REJECTED), buffer.getvalue().to_pybytes())


def read_rejected(folder: urls.Location) -> Iterator[dict[str, str]]:
    """The records rejected by `prepare`, a few thousand in memory at a time; none if there is no such file."""
    location = urls.join(urls.absolute(folder), REJECTED)
    if not files.is_file(location):
        return
    with files.open_input(location) as source, pq.ParquetFile(source) as parquet:
        for batch in parquet.iter_batches(2048):
            yield from batch.to_pylist()
