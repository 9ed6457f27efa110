"""Shard folders: Parquet files of rows (`data.schema`) and a manifest of what is in them.

The manifest lists per file its row groups with their rows per task, so that a training plan can be drawn without
opening a file. Files and manifest appear complete or not at all: each is written aside and moved into place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data.schema import REJECTED_SCHEMA, SCHEMA
from lumen_ray.errors import UserError

MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
SCHEMA_VERSION = 1
ROWS_PER_GROUP = 32


class ShardWriter:
    """Writes rows to one Parquet file. A context manager: on success the file is moved into place, on an error dropped.

    with ShardWriter(folder, "part-00000.parquet", rows_per_group=32) as writer:
        writer.write(row)
    writer.entry   # the file's entry in the manifest
    """

    def __init__(self, folder: str | Path, name: str, rows_per_group: int = ROWS_PER_GROUP):
        if rows_per_group < 1:
            raise UserError(f"rows_per_group must be at least 1, got {rows_per_group}", "invalid_config")
        self.path = Path(folder) / name
        self.rows_per_group = rows_per_group
        self.entry: dict[str, Any] | None = None
        self._partial = self.path.with_name(f".{name}.{os.getpid()}.partial")
        self._pending: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of `schema.make_row`."""
        self._pending.append(row)
        if len(self._pending) == self.rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._partial,
                SCHEMA,
                compression="zstd",
                use_dictionary=["source"],  # a dictionary of image bytes would only cost time
                write_statistics=["image_id"],
            )
        rows, self._pending = self._pending, []
        self._writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=len(rows))
        tasks = Counter(task for row in rows for task in set(row["tasks"]))
        self._groups.append({"rows": len(rows), "tasks": dict(sorted(tasks.items()))})

    def close(self) -> dict[str, Any] | None:
        """Finish the file; its manifest entry, or None (and no file) when no row was written."""
        if self._pending:
            self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        self._writer = None
        self.entry = {
            "path": self.path.name,
            "rows": sum(group["rows"] for group in self._groups),
            "row_groups": self._groups,
            "bytes": self._partial.stat().st_size,
            "sha256": sha256(self._partial),
        }
        os.replace(self._partial, self.path)
        return self.entry

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._partial.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_manifest(
    files: Iterable[dict[str, Any]],
    *,
    categories: Sequence[dict[str, Any]] = (),
    counts: dict[str, dict[str, int]] | None = None,
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of finished files (entries of `ShardWriter`).

    `categories`: ``{"name", "keypoints": [names], "skeleton": [[i, j], ...]}``, 0-based; `counts`: what came in,
    per kind of record, e.g. ``{"images": {"in": 10, "written": 9, "rejected": 1}}``; `origin`: the settings used.
    """
    files = list(files)
    tasks: Counter[str] = Counter()
    for group in (group for file in files for group in file["row_groups"]):
        tasks.update(group["tasks"])
    counts = counts or {}
    for kind, count in counts.items():
        assert count["in"] == count["written"] + count["rejected"], f"{kind} do not add up: {count}"
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": sum(file["rows"] for file in files),
        "tasks": dict(sorted(tasks.items())),
        "categories": list(categories),
        "counts": counts,
        "rejected": sum(count["rejected"] for count in counts.values()),
        "origin": origin or {},
        "files": files,
    }


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> Path:
    """Write `manifest` into the folder, atomically."""
    path = Path(folder) / MANIFEST
    partial = path.with_name(f".{MANIFEST}.{os.getpid()}.partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(partial, path)
    return path


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a shard folder; `UserError` (reason `not_shards`) when the folder is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        why = "does not exist" if not Path(folder).exists() else f"holds no {MANIFEST}"
        raise UserError(f"'{folder}' {why}; give a folder that `lumen-ray prepare` has written", "not_shards")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema_version"]
        manifest["files"], manifest["tasks"], manifest["categories"]  # noqa: B018  all three must be there
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"'{path}' is not a shard manifest; run `lumen-ray prepare` again", "not_shards") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"'{path}' has schema version {version}, not {SCHEMA_VERSION}; run `lumen-ray prepare` again",
            "not_shards",
        )
    return manifest


def _open_file(folder: str | Path, file: str) -> pq.ParquetFile:
    path = Path(folder) / file
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"shard file '{path}' is missing; run `lumen-ray prepare` again", "broken_shards") from None
    except (pa.ArrowInvalid, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"shard file '{path}' is damaged ({why}); run `lumen-ray prepare` again", "broken_shards"
        ) from None


def read_row_group(folder: str | Path, file: str, index: int) -> list[dict[str, Any]]:
    """The rows of row group `index` of a file named in the manifest; `UserError` (`broken_shards`) if it is damaged."""
    with _open_file(folder, file) as parquet:
        if not 0 <= index < parquet.num_row_groups:
            raise UserError(
                f"shard file '{file}' has {parquet.num_row_groups} row groups, not one of number {index}",
                "broken_shards",
            )
        return parquet.read_row_group(index).to_pylist()


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a shard folder, one sentence each; empty when files, sizes, checksums and rows agree."""
    problems = []
    for entry in read_manifest(folder)["files"]:
        path = Path(folder) / entry["path"]
        if not path.is_file():
            problems.append(f"{entry['path']} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{entry['path']} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{entry['path']} does not match its checksum")
        else:
            with _open_file(folder, entry["path"]) as parquet:
                groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            if groups != [group["rows"] for group in entry["row_groups"]]:
                problems.append(f"{entry['path']} has row groups of {groups} rows, the manifest says otherwise")
    return problems


def write_rejected(folder: str | Path, records: Sequence[dict[str, str]]) -> None:
    """Write `rejected.parquet` (image_id, origin, reason), also when nothing was rejected."""
    path = Path(folder) / REJECTED
    partial = path.with_name(f".{REJECTED}.{os.getpid()}.partial")
    pq.write_table(pa.Table.from_pylist(list(records), schema=REJECTED_SCHEMA), partial, compression="zstd")
    os.replace(partial, path)


def read_rejected(folder: str | Path) -> list[dict[str, str]]:
    """The records set aside by `prepare`, each with its reason."""
    return pq.read_table(Path(folder) / REJECTED).to_pylist()
