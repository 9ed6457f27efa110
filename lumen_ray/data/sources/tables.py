"""Tables of records too long for one process: csv, tsv, jsonl and parquet files, read in chunks.

The driver reads a text file once, line by line, and notes where chunks of records start; a task reads one chunk. So no
process holds more than a chunk, csv fields may contain line breaks, and the number of records is known before any task
starts.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.data.frames import read_frame
from lumen_ray.data.pictures import (
    BARE,
    EXACT,
    SPELLING,
    bare_key,
    distinct_names,
    identity,
    path_key,
    read_picture,
)
from lumen_ray.data.sources.record_parsing import LINE_SUFFIXES, Record, check_name, first_of, image_ref, parse_line
from lumen_ray.errors import UserError
from lumen_ray.structures import Size

CHUNK_RECORDS = 512
#: column separators by extension
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, *LINE_SUFFIXES, ".parquet")
_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 1 << 26

# {"path", "records", "first"} and {"start", "end", "columns"} of text or {"group"} of parquet; and, by `link_images`,
# {"name", "repeats", "shared", "shared_paths"}
Chunk = dict[str, Any]


def chunks(location: str, has_header: bool = True, size: int = CHUNK_RECORDS) -> list[Chunk]:
    """The chunks of a file. Raises `UserError` if it is missing, of another kind, or not readable at all.

    `has_header`: of csv and tsv files; without one, columns are named "0", "1", ...
    """
    suffix = _suffix(location)
    if suffix not in SUFFIXES:
        raise UserError(f"'{location}' is not a known kind of table; kinds: {', '.join(SUFFIXES)}", "unknown_table")
    if not files.is_file(location):
        raise UserError(f"annotation file '{location}' does not exist", "missing_annotations")
    if suffix == ".parquet":
        return _parquet_chunks(location)
    with _reading(location), files.open_input(location) as file:
        lines = _Lines(file)
        columns = None
        if suffix in DELIMITERS and has_header:
            columns = next((row for row in _rows(lines, suffix) if isinstance(row, list)), None)
            if columns is None:
                raise UserError(f"'{location}' is empty; it needs a line of column names", "invalid_annotations")
        found: list[Chunk] = []
        base = {"path": location, "columns": columns}
        start, number = lines.position, 0
        for number, _ in enumerate(_records(lines, suffix), start=1):
            if number % size == 0:
                found.append(base | {"records": size, "first": number - size, "start": start, "end": lines.position})
                start = lines.position
        if number % size:
            rest = number % size
            found.append(base | {"records": rest, "first": number - rest, "start": start, "end": lines.position})
    return found


def read_chunk(chunk: Chunk) -> Iterator[tuple[str, Record | UserError]]:
    """(origin, record) of each record, in order; one that cannot be read is replaced by its error."""
    name = chunk.get("name") or urls.base_name(chunk["path"])
    for number, value in enumerate(_values(chunk), start=chunk["first"]):
        yield f"{name} record {number}", value


def _values(chunk: Chunk) -> Iterator[Any]:
    if "group" in chunk:
        yield from _read_group(chunk)
        return
    suffix = _suffix(chunk["path"])
    with _reading(chunk["path"]), files.open_input(chunk["path"]) as file:
        lines = _Lines(file, chunk["start"], chunk["end"])
        for value in _records(lines, suffix):
            if suffix in DELIMITERS:
                yield _named(value, chunk["columns"])
            else:
                yield parse_line(value)


def _suffix(location: str) -> str:
    return os.path.splitext(urls.base_name(location))[1].lower()


@contextmanager
def _reading(location: str) -> Iterator[None]:
    """Turns `OSError` into `StoreError`: if an open file can no longer be read, the store is at fault, not a record."""
    try:
        yield
    except OSError as error:
        raise files.StoreError(f"'{location}' can no longer be read: {error}", "store_unreachable") from None


class _Lines:
    """Lines of an open binary file up to byte `end`; `position`: where the next line starts."""

    def __init__(self, file: Any, start: int = 0, end: int | None = None):
        file.seek(start)
        self.file, self.position, self.end = io.BufferedReader(file, 1 << 20), start, end

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        at_end = self.end is not None and self.position >= self.end
        line = b"" if at_end else self.file.readline(_LONGEST_LINE)
        if not line:
            raise StopIteration
        first = self.position == 0
        self.position += len(line)
        return line.removeprefix(_BOM) if first else line


def _records(lines: _Lines, suffix: str) -> Iterator[Any]:
    """The csv rows (or a row's error), or the lines that are not blank."""
    if suffix in DELIMITERS:
        yield from (row for row in _rows(lines, suffix) if row != [])
    else:
        yield from (line for line in lines if line.strip())


def _rows(lines: _Lines, suffix: str) -> Iterator[list[str] | UserError]:
    # bytes that are not UTF-8 become surrogates, which `clean_text` rejects
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), delimiter=DELIMITERS[suffix])
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield UserError(f"the line cannot be read as csv: {error}", "invalid_record")


def _named(row: list[str] | UserError, columns: list[str] | None) -> Record | UserError:
    if isinstance(row, UserError):
        return row
    if columns is None:
        return {str(number): value for number, value in enumerate(row)}
    if len(row) != len(columns):
        return UserError(f"it has {len(row)} columns, the first line names {len(columns)}", "invalid_record")
    return dict(zip(columns, row, strict=True))


def _parquet_chunks(location: str) -> list[Chunk]:
    try:
        with files.open_input(location) as file, pq.ParquetFile(file) as table:
            rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"'{location}' is not a readable parquet file: {why}", "invalid_annotations") from None
    return [{"path": location, "records": n, "first": sum(rows[:i]), "group": i} for i, n in enumerate(rows) if n]


def _read_group(chunk: Chunk, columns: list[str] | None = None) -> Iterator[Any]:
    """The rows of a row group, read in batches; rows after a damaged page are replaced by the error. `columns` None:
    all."""
    done = 0
    try:
        with files.open_input(chunk["path"]) as file, pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=64, row_groups=[chunk["group"]], columns=columns):
                rows = batch.to_pylist()
                done += len(rows)
                yield from rows
    except (pa.ArrowException, OSError) as error:
        files.exists(chunk["path"])  # raises when it is the store that fails
        why = f"its row group cannot be read: {str(error).splitlines()[0]}"
        for _ in range(chunk["records"] - done):
            yield UserError(why, "invalid_record")


def column_names(chunk: Chunk) -> list[str] | None:
    """The columns of a chunk's file; None if they are not known before its records are read."""
    if "group" not in chunk:
        return chunk["columns"]
    with files.open_input(chunk["path"]) as file, pq.ParquetFile(file) as table:
        return list(table.schema_arrow.names)


def pick_column(columns: list[str] | None, wanted: str | None, usual: tuple[str, ...], what: str) -> str | None:
    """The column `wanted` by an option, else the first of the `usual` ones; without known columns, `wanted` itself.

    Raises `UserError` that lists the columns if there is no such column.
    """
    if columns is None:
        return wanted
    found = next((name for name in ((wanted,) if wanted is not None else usual) if name in columns), None)
    if found is None:
        option = f"--{what}-column"
        raise UserError(
            f"no column {wanted or 'of the usual names'} for the {what}; give {option}, columns: {', '.join(columns)}",
            "unknown_column",
        )
    return found


def cell(record: Record, column: str | None, usual: tuple[str, ...]) -> Any:
    """The value of a record under `column` or, without one, the first of the `usual` columns; None if there is none."""
    return first_of(record, usual if column is None else (column,))


def link_images(chunks: Sequence[Chunk], *columns: tuple[str | None, tuple[str, ...]]) -> None:
    """Adds to each chunk what its records cannot know of the others, for `load_image` and `image_id`.

    `columns`: (wanted, usual names) of the columns of images, as for `cell`; the first one gives the rows their ids.
    Reads all names once, on the driver, and keeps 32 bytes of each. Entries added: `shared_paths` and `shared`, hashes
    of the images whose file must not be guessed by its spelling, or without its folders (see `pictures.ListedNames`);
    `repeats`, record in the chunk -> number of earlier records of the same image; `name`, distinct for files of equal
    base names.
    """
    bare, path, full, owner = (array("Q") for _ in range(4))
    first, place = array("Q"), array("Q")  # of the first column: index into the above, record in its chunk
    for number, chunk in enumerate(chunks):
        for record, cells in enumerate(_image_cells(chunk, columns)):
            for column, name in enumerate(cells):
                if not name:
                    continue
                if column == 0:
                    first.append(len(bare))
                    place.append(record)
                bare.append(_hash(bare_key(name)))
                path.append(_hash(path_key(name)))
                full.append(_hash(identity(name)))
                owner.append(number)
    names = distinct_names({chunk["path"] for chunk in chunks})
    for chunk in chunks:
        chunk |= {"name": names[chunk["path"]], "shared": [], "shared_paths": [], "repeats": {}}
    identities, owners = _as_numpy(full), _as_numpy(owner)
    for entry, keys in (("shared", _as_numpy(bare)), ("shared_paths", _as_numpy(path))):
        is_shared = np.isin(keys, _shared(keys, identities))
        for key, number in set(zip(keys[is_shared].tolist(), owners[is_shared].tolist(), strict=True)):
            chunks[number][entry].append(key)
    rows = np.array(first, np.int64)
    times = _earlier(identities[rows])
    for row in np.flatnonzero(times).tolist():
        chunks[int(owners[rows[row]])]["repeats"][str(place[row])] = int(times[row])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _as_numpy(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, np.uint64) if values else np.zeros(0, np.uint64)


def _shared(keys: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """The keys that belong to more than one identity."""
    pairs = np.unique(np.stack([keys, identities], 1), axis=0)
    keys, numbers = np.unique(pairs[:, 0], return_counts=True)
    return keys[numbers > 1]


def _earlier(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each one, int64 [N]."""
    order = np.argsort(values, kind="stable")
    runs = values[order]
    starts = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]])) if len(runs) else np.zeros(0, np.int64)
    found = np.zeros(len(values), np.int64)
    lengths = np.diff(np.append(starts, len(runs)))
    found[order] = np.arange(len(runs)) - np.repeat(starts, lengths)
    return found


def _image_cells(chunk: Chunk, columns: Sequence[tuple[str | None, tuple[str, ...]]]) -> Iterator[Sequence[str | None]]:
    """The names of images in each record of a chunk, one per column; None for one that has none."""
    if "group" not in chunk:
        values = _values(chunk)
    elif not (leaves := _name_leaves(chunk, {n for wanted, usual in columns for n in ([wanted] if wanted else usual)})):
        return  # bytes alone: no names to read
    else:
        values = _read_group(chunk, leaves)
    for value in values:
        found = [cell(value, *column) if isinstance(value, dict) else None for column in columns]
        found = [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in found]
        paths = [cell.get("path") if isinstance(cell, dict) else cell for cell in found]
        yield [path if isinstance(path, str) else None for path in paths]


_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def _name_leaves(chunk: Chunk, columns: Collection[str]) -> list[str]:
    """The parts of columns of a parquet file that can hold names: all but bytes, and `path` of mappings."""
    with files.open_input(chunk["path"]) as file, pq.ParquetFile(file) as table:
        leaves = []
        for field in table.schema_arrow:
            kind = field.type
            if field.name not in columns or any(of(kind) for of in _BYTES):
                continue
            if not pa.types.is_struct(kind):
                leaves.append(field.name)
            elif kind.get_field_index("path") >= 0:
                leaves.append(f"{field.name}.path")
        return leaves


def image_id(chunk: Chunk, place: int, origin: str, name: str | None) -> str:
    """The id of the row of record `place`: the image's name, numbered from its second row on, else the `origin`."""
    earlier = chunk.get("repeats", {}).get(str(place), 0)
    return origin if name is None else f"{name}#{earlier + 1}" if earlier else name


def trust(chunk: Chunk, name: str) -> int:
    """How far the file of an image may be guessed, as `pictures.ListedNames.trust`."""
    if _hash(path_key(name)) in chunk.get("shared_paths", ()):
        return EXACT
    return SPELLING if _hash(bare_key(name)) in chunk.get("shared", ()) else BARE


def load_image(
    value: Any, folder: str | None, what: str = "the image", chunk: Chunk | None = None
) -> tuple[str | None, bytes, Size]:
    """(name, encoded bytes, (height, width) after EXIF rotation) of a cell: bytes, a mapping of bytes and path as in
    Hugging Face's tables, or a name below `folder` (in json also base64, see `image_ref`). The name is None if only
    bytes are given.

    `chunk`: that of the cell. Raises `UserError` if the image is missing or does not decode, `StoreError` if the store
    is unreachable.
    """
    name = None
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        name, value = value.get("path"), value["bytes"]
    try:
        if value is not None and not isinstance(value, bytes):
            name, value = _read_ref(value, folder, chunk or {})
        size = read_frame(value, []).size
    except UserError as error:
        raise type(error)(f"{what}: {error}" if what != "the image" else str(error), error.reason) from None
    assert value is not None, "read_frame raises"
    return (check_name(name) if isinstance(name, str) and name else None), value, size


def _read_ref(value: Any, folder: str | None, chunk: Chunk) -> tuple[str | None, bytes | None]:
    """(name, encoded bytes) of an image that a cell names, or holds in base64; Nones for an empty cell."""
    ref = image_ref({"image": value})
    if ref is None:
        return None, None
    if ref.data is not None:
        return value.get("path") if isinstance(value, dict) else None, base64.b64decode(ref.data)
    if folder is None and not urls.is_url(ref.name) and not os.path.isabs(ref.name):
        raise UserError(f"'{ref.name}' is a path; give its folder as --images", "no_images")
    return ref.name, read_picture(folder or "", ref.name, trust(chunk, ref.name))
