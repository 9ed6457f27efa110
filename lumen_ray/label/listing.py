"""The images of an input, found one by one: folders and globs, lists, tables and tars of images, on any store.

A listing is never held whole: it can be consumed while it goes on.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.data.pictures import SUFFIXES, is_hidden, is_picture
from lumen_ray.data.sources import tars
from lumen_ray.data.walk import walk
from lumen_ray.errors import UserError, suggest
from lumen_ray.label.inputs import Item

#: files of images: what each suffix holds
TABLES = (".parquet",)
RECORDS = (".csv", ".tsv", ".jsonl", ".ndjson")
LISTS = (".txt", ".lst")
#: columns looked for in tables and records, in this order: encoded images, then paths and URLs
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file", "image", "img", "image_url", "url", "uri")
ID_COLUMNS = ("image_id", "__key__", "id", "key")
_NOT_SHARDS = ("rejected.parquet", "errors.parquet")
_SHARD = {"image_id", "image", "height"}


class Listing:
    """The images of `source`, found anew by each iteration.

    source: a folder (searched recursively; ids are paths relative to it), a glob, one image, a ``.txt`` list of paths
    and URLs, a ``.csv``, ``.tsv``, ``.jsonl`` or Parquet file with a column of images or of their paths, a WebDataset
    ``.tar``, or a folder that directly holds Parquet files or tars. Paths in lists and tables are relative to the
    file. exclude: a local folder that is passed over. column: the column of images or paths, if it has an unusual name.
    `left_out`: number of other files by suffix that the last iteration met, hidden ones not counted.

    An iteration raises `UserError` if the source does not exist, has no such column, or holds no image.
    """

    def __init__(self, source: str | Path, exclude: Path | None = None, column: str | None = None):
        self.source, self.exclude, self.column = str(source), exclude, column
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Item]:
        self.left_out.clear()
        empty = True
        for item in self._items():
            empty = False
            yield item
        if empty:
            raise UserError(
                f"input '{urls.shown(self.source)}' holds no image; file types read: {', '.join(SUFFIXES)}",
                "empty_input",
            )

    def _items(self) -> Iterator[Item]:
        if files.is_dir(self.source):
            yield from self._folder()
        elif files.is_file(self.source):
            yield from self._file(self.source, urls.base_name(self.source))
        elif files.has_wildcards(self.source):
            yield from self._glob()
        else:
            raise UserError(
                f"input '{urls.shown(self.source)}' does not exist; give a folder of images, a shard folder, a glob "
                "such as 'photos/**/*.jpg', or a list, table or tar of images",
                "missing_input",
            )

    def _glob(self) -> Iterator[Item]:
        folder, pattern = files.split_pattern(self.source)
        if not files.is_dir(folder):
            return
        rest = urls.split(self.source)[1].removeprefix(urls.split(folder)[1])
        depth = None if "**" in rest else rest.strip("/").count("/")
        for name in walk(folder, self.exclude, depth):
            if not pattern.fullmatch(name) or is_hidden(name):
                continue
            location = name if folder == "." and not self.source.startswith("./") else urls.join(folder, name)
            if name.endswith((*TABLES, ".tar")):
                yield from self._file(location, urls.shown(location))
            else:
                yield from self._picture(urls.shown(location), location)

    def _folder(self) -> Iterator[Item]:
        direct = [name for name in _direct_names(self.source) if name not in _NOT_SHARDS]
        for suffix in (*TABLES, ".tar"):
            if held := sorted(name for name in direct if name.endswith(suffix)):
                for name in held:
                    yield from self._file(urls.join(self.source, name), name)
                return
        for name in walk(self.source, self.exclude):
            if not is_hidden(name):
                yield from self._picture(name, urls.join(self.source, name))

    def _picture(self, name: str, location: str) -> Iterator[Item]:
        try:
            name.encode()
        except UnicodeEncodeError:
            self.left_out["name that is not UTF-8"] += 1
            return
        if is_picture(name):
            yield Item(name, location)
        else:
            self.left_out[posixpath.splitext(name)[1].lower() or "no suffix"] += 1

    def _file(self, location: str, name: str) -> Iterator[Item]:
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in TABLES:
            yield from _table_items(location, self.column)
        elif suffix in RECORDS:
            yield from _record_items(location, suffix, self.column)
        elif suffix in LISTS:
            yield from _list_items(location)
        elif name.endswith(tars.SUFFIXES):
            yield from self._tar_items(location, name)
        else:
            yield Item(name, location)

    def _tar_items(self, location: str, name: str) -> Iterator[Item]:
        for member in tars.members(location):
            if isinstance(member, UserError):
                yield Item(name, location, fault=str(member))
            elif is_picture(member[0]):
                yield Item(member[0], location, offset=member[1], length=member[2])
            else:
                self.left_out[posixpath.splitext(member[0])[1].lower() or "no suffix"] += 1


def _direct_names(folder: str) -> list[str]:
    """Names of the tables and tars directly in a folder, none of them hidden."""
    return [n for n in files.list_files(folder, (*TABLES, ".tar")) if not is_hidden(n)]


def _choose(names: Sequence[str], wanted: str | None, kinds: Sequence[str], location: str) -> str:
    """The column of images or paths. Raises `UserError` naming the columns there are."""
    have = ", ".join(names)
    if wanted is not None:
        if wanted not in names:
            raise UserError(
                f"'{urls.shown(location)}' has no column '{wanted}';{suggest(wanted, list(names))} columns: {have}",
                "unknown_column",
            )
        return wanted
    for name in kinds:
        if name in names:
            return name
    raise UserError(
        f"'{urls.shown(location)}' has no column of images or of their paths, such as {', '.join(kinds[:4])}; name it "
        f"with --image-column, of: {have}",
        "unknown_column",
    )


def _table_items(location: str, wanted: str | None) -> Iterator[Item]:
    """The rows of a Parquet file; of a shard those that have an image. Reads ids, heights and paths only."""
    try:
        with files.as_user_error(location), files.open_input(location) as opened:
            file = pq.ParquetFile(opened)
            schema = file.schema_arrow
            is_shard = set(schema.names) >= _SHARD
            images = [n for n in IMAGE_COLUMNS if n in schema.names and _holds_images(schema.field(n).type)]
            paths = [n for n in PATH_COLUMNS if n in schema.names and n not in images]
            known = [*images, *paths] or IMAGE_COLUMNS
            column = "image" if is_shard else _choose(schema.names, wanted, known, location)
            encoded = _holds_images(schema.field(column).type)
            ids = next((name for name in ID_COLUMNS if name in schema.names), None)
            read = [n for n in dict.fromkeys([ids, "height" if is_shard else None, None if encoded else column]) if n]
            stem, start = urls.base_name(location), 0
            for group in range(file.num_row_groups):
                number = file.metadata.row_group(group).num_rows
                table = file.read_row_group(group, columns=read) if read else None
                names = table[ids].to_pylist() if ids and table is not None else [None] * number
                values = table[column].to_pylist() if not encoded and table is not None else [None] * number
                # text-only rows of a shard have no height
                kept = table["height"].to_pylist() if is_shard and table is not None else [1] * number
                for row in range(number):
                    name = f"{stem}#{start + row}" if names[row] is None else str(names[row])
                    if not kept[row]:
                        continue
                    if encoded:
                        yield Item(name, location, group, row, column)
                    else:
                        yield _named(values[row], location, name if ids else None, f"row {start + row}")
                start += number
    except pa.ArrowInvalid:
        raise UserError(
            f"'{urls.shown(location)}' is not a Parquet file; write it again or remove it", "invalid_input"
        ) from None


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column has encoded images: bytes, or a struct with ``bytes``."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _named(path: Any, location: str, name: str | None, where: str) -> Item:
    """The image that a record names. `name`: its id, by default the path as it is written."""
    shown = f"{urls.base_name(location)}, {where}"
    if not isinstance(path, str) or not path.strip():
        return Item(name or shown, location, fault=f"{where} of '{urls.shown(location)}' names no image")
    path = path.strip()
    there = path if urls.is_url(path) else urls.join(urls.parent(location), path)
    return Item(name or path, there)


def _lines(location: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a UTF-8 file."""
    with files.as_user_error(location), files.open_input(location) as file:
        try:
            yield from enumerate(io.TextIOWrapper(file, "utf-8-sig", newline=""), 1)
        except UnicodeDecodeError:
            raise UserError(f"'{urls.shown(location)}' is not UTF-8 text", "invalid_text") from None


def _list_items(location: str) -> Iterator[Item]:
    for number, line in _lines(location):
        if line.strip():
            yield _named(line, location, None, f"line {number}")


def _record_items(location: str, suffix: str, wanted: str | None) -> Iterator[Item]:
    column = ""
    for where, record in _csv(location, suffix) if suffix in (".csv", ".tsv") else _json_lines(location):
        if isinstance(record, str):
            yield Item(f"{urls.base_name(location)}, {where}", location, fault=record)
            continue
        column = column or _choose(list(record), wanted, PATH_COLUMNS, location)
        ids = next((record[name] for name in ID_COLUMNS if record.get(name) is not None), None)
        yield _named(record.get(column), location, None if ids is None else str(ids), where)


def _csv(location: str, suffix: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    reader = csv.DictReader((line for _, line in _lines(location)), delimiter="\t" if suffix == ".tsv" else ",")
    try:
        for record in reader:
            yield f"line {reader.line_num}", {k: v for k, v in record.items() if isinstance(k, str)}
    except csv.Error as error:
        yield f"line {reader.line_num}", f"line {reader.line_num} of '{urls.shown(location)}' cannot be read: {error}"


def _json_lines(location: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, line in _lines(location):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        where = f"line {number}"
        yield where, record if isinstance(record, dict) else f"{where} of '{urls.shown(location)}' is not a JSON object"
