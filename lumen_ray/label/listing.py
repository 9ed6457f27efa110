"""The images of an input, found one by one: folders and globs, lists, tables and tars of images, on any store.

A listing is never held whole: it can be consumed while it goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files, patterns, urls
from lumen_ray.data.pictures import SUFFIXES, is_hidden, is_picture, kind_of
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
#: what an output folder of `label` has
_JOB = ("job.json", "ledger")
_ONE_SLASH = re.compile(r"(s3|gs|gcs|az|hf|https?):/(?!/)")
_LONGEST_FIELD = 1 << 26  # of a CSV file, in characters
_CHAT_REQUEST = {"custom_id", "body"}
_SHARD = {"image_id", "image", "height"}


class Listing:
    """The images of `source`, found anew by each iteration.

    source: a folder (searched recursively; ids are paths relative to it), a glob, one image, a ``.txt`` list of paths
    and URLs, a ``.csv``, ``.tsv``, ``.jsonl`` or Parquet file with a column of images or of their paths, a WebDataset
    ``.tar``, or a folder that directly holds Parquet files or tars and no picture. Paths in lists and tables are
    relative to the file. exclude: a local folder that is passed over. column: the column of images or paths, if it has
    an unusual name. `left_out`: number of other files by suffix, and of what else the last iteration passed over,
    hidden files not counted.

    Output folders of label jobs, with their thumbnails, are passed over. An iteration raises `UserError` if the source
    does not exist, is such a folder itself, has no such column, or holds no image.
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

    def check(self) -> None:
        """Raises `UserError` if there is no such input (`missing_input`), or it is the output of a job
        (`labelled_input`)."""
        source = self.source
        if urls.is_url(source):
            files.filesystem(source)  # raises for web addresses
        if not (files.is_dir(source) or files.is_file(source) or patterns.has_wildcards(source)):
            raise UserError(
                f"input '{urls.shown(source)}' does not exist; give a folder of images, a shard folder, a glob "
                "such as 'photos/**/*.jpg', or a list, table or tar of images",
                "missing_input",
            )
        root = source_folder(source)
        if root is not None and all(files.exists(urls.join(root, name)) for name in _JOB):
            raise UserError(
                f"input '{urls.shown(source)}' is an output folder of `lumen-ray label`; give the images that it was "
                "made from, or move them into a folder of their own",
                "labelled_input",
            )

    def _items(self) -> Iterator[Item]:
        self.check()
        if files.is_dir(self.source):
            yield from self._folder()
        elif files.is_file(self.source):
            yield from self._file(urls.absolute(self.source), urls.base_name(self.source))
        else:
            yield from self._glob()

    def _glob(self) -> Iterator[Item]:
        folder, pattern = patterns.split_pattern(self.source)
        if not files.is_dir(folder):
            return
        rest = urls.split(self.source)[1].removeprefix(urls.split(folder)[1])
        depth = None if "**" in rest else rest.strip("/").count("/")
        for name in walk(folder, self.exclude, depth, self.left_out, _JOB):
            if not pattern.fullmatch(name) or is_hidden(name):
                continue
            written = name if folder == "." and not self.source.startswith("./") else urls.join(folder, name)
            location = urls.absolute(written)
            if _is_archive(name):
                yield from self._file(location, urls.shown(written), is_one_of_many=True)
            else:
                yield from self._picture(urls.shown(written), location)

    def _folder(self) -> Iterator[Item]:
        root = urls.absolute(self.source)
        for suffix in _archives(root):
            for name in (n for n in walk(root, depth=0) if n.lower().endswith(suffix) and n not in _NOT_SHARDS):
                if not is_hidden(name):
                    yield from self._file(urls.join(root, name), name, is_one_of_many=True)
            return
        for name in walk(root, self.exclude, passed_over=self.left_out, marks=_JOB):
            if not is_hidden(name):
                yield from self._picture(name, urls.join(root, name))

    def _picture(self, name: str, location: str) -> Iterator[Item]:
        try:
            name.encode()
        except UnicodeEncodeError:
            self.left_out["name that is not UTF-8"] += 1
            return
        if is_picture(name):
            yield Item(name, location)
        else:
            self.left_out[kind_of(name)] += 1

    def _file(self, location: str, name: str, is_one_of_many: bool = False) -> Iterator[Item]:
        """The images of a file. `is_one_of_many`: a damaged one is a failed image and does not end the listing."""
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in TABLES:
            try:
                yield from _table_items(location, self.column)
            except UserError as error:
                if not is_one_of_many or isinstance(error, files.StoreError):
                    raise
                yield Item(name, location, fault=str(error))
        elif suffix in RECORDS:
            yield from _record_items(location, suffix, self.column)
        elif suffix in LISTS:
            yield from _list_items(location)
        elif name.lower().endswith(tars.SUFFIXES):
            yield from self._tar_items(location, name)
        else:
            yield Item(name, location)

    def _tar_items(self, location: str, name: str) -> Iterator[Item]:
        key, has_picture = "", False
        others: Counter[str] = Counter()  # of a sample that has no picture so far
        for member in tars.members(location):
            if isinstance(member, UserError):
                yield Item(name, location, fault=str(member))
                continue
            if (of := tars.sample_key(member[0])) != key:
                self.left_out.update(others)
                key, has_picture, others = of, False, Counter()
            if is_picture(member[0]):
                has_picture, others = True, Counter()
                yield Item(member[0], location, offset=member[1], length=member[2])
            elif not has_picture:
                others[kind_of(member[0])] += 1
        self.left_out.update(others)


def source_folder(source: urls.Location) -> str | None:
    """The folder whose files are listed for `source`, a folder or a glob; None for a file."""
    if files.is_dir(source):
        return str(source)
    return None if files.is_file(source) or not patterns.has_wildcards(source) else patterns.split_pattern(source)[0]


def check_output(source: urls.Location, output: urls.Location) -> None:
    """Raises `UserError` if the labels of `source` are to go among its images themselves or into a repository of the
    Hugging Face Hub, where each file would be a commit (`invalid_output`), and for URLs with a slash too few
    (`invalid_url`), which would be local paths."""
    for kind, location in (("input", str(source)), ("output", str(output))):
        if match := _ONE_SLASH.match(location):
            right = f"{match[1]}://{location[match.end() :]}"
            raise UserError(f"{kind} '{urls.shown(location)}' is no URL; did you mean '{right}'?", "invalid_url")
    if urls.is_url(output):
        files.filesystem(output)  # raises for web addresses
        if urls.split(output)[0] == "hf":
            raise UserError(
                f"output '{urls.shown(output)}' is on the Hugging Face Hub, which is only read; give a local folder or "
                "one of s3://, gs://, az://",
                "invalid_output",
            )
    folder = source_folder(source)
    if folder is not None and _real(folder) == _real(output):
        raise UserError(
            f"output '{urls.shown(output)}' is the input; give a folder of its own, which may be inside it, such as "
            f"'{urls.shown(urls.join(output, 'labels'))}'",
            "invalid_output",
        )


def _real(folder: urls.Location) -> str:
    return urls.absolute(folder) if urls.is_url(folder) else os.path.realpath(urls.absolute(folder))


def _is_archive(name: str) -> bool:
    return name.lower().endswith((*TABLES, ".tar"))


def _archives(folder: str) -> list[str]:
    """The suffix of the tables or, without any, tars directly in a folder that directly holds no picture; else none."""
    found = set()
    for name in walk(folder, depth=0):
        if is_picture(name) and not is_hidden(name):
            return []
        if _is_archive(name) and not is_hidden(name) and name not in _NOT_SHARDS:
            found.add(posixpath.splitext(name)[1].lower())
    return [suffix for suffix in (*TABLES, ".tar") if suffix in found][:1]


def _choose(names: Sequence[str], wanted: str | None, kinds: Sequence[str], location: str) -> str:
    """The column of images or paths. Raises `UserError` naming the columns there are."""
    for name in [wanted] if wanted else kinds:
        if name in names:
            return name
    raise _no_column(names, wanted, kinds, location)


def _no_column(names: Sequence[str], wanted: str | None, kinds: Sequence[str], location: str) -> UserError:
    have = ", ".join(names)
    for separator in ";|\t":
        if len(names) == 1 and separator in names[0]:
            shown = "a tab" if separator == "\t" else f"'{separator}'"
            return UserError(
                f"the columns of '{urls.shown(location)}' are separated by {shown}; write it with commas, or with "
                "tabs as .tsv",
                "wrong_separator",
            )
    if wanted is not None:
        return UserError(
            f"'{urls.shown(location)}' has no column '{wanted}';{suggest(wanted, list(names))} columns: {have}",
            "unknown_column",
        )
    return UserError(
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
        return Item(
            name or shown, location, record=name or shown, fault=f"{where} of '{urls.shown(location)}' names no image"
        )
    path = path.strip()
    there = path if urls.is_url(path) else urls.join(urls.parent(location), path.removeprefix("file://"))
    return Item(name or urls.shown(path), there, record=name or path)


def _lines(location: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a UTF-8 file."""
    with files.as_user_error(location), files.open_input(location) as file:
        try:
            yield from enumerate(io.TextIOWrapper(file, "utf-8-sig", newline=""), 1)
        except UnicodeDecodeError:
            raise UserError(f"'{urls.shown(location)}' is not UTF-8 text", "invalid_text") from None


def _list_items(location: str) -> Iterator[Item]:
    for number, line in _lines(location):
        if line.strip() and not line.startswith("#"):
            yield _named(line, location, None, f"line {number}")


def _record_items(location: str, suffix: str, wanted: str | None) -> Iterator[Item]:
    column = ""
    unusable: UserError | None = None
    for where, record in _csv(location, suffix) if suffix in (".csv", ".tsv") else _json_lines(location):
        if not isinstance(record, str):
            names = [name for name in ([wanted] if wanted else PATH_COLUMNS) if name in record]
            if column or names:
                column = column or names[0]
            else:
                if record.keys() >= _CHAT_REQUEST:
                    raise UserError(
                        f"'{urls.shown(location)}' is a batch file of chat requests, not a list of images; give it as "
                        "--input-jsonl, in Python to answer_batch",
                        "batch_file",
                    )
                unusable = unusable or _no_column(list(record), wanted, PATH_COLUMNS, location)
                record = f"{where} of '{urls.shown(location)}' has no column of image paths"
        if isinstance(record, str):
            yield Item(f"{urls.base_name(location)}, {where}", location, fault=record)
            continue
        ids = next((record[name] for name in ID_COLUMNS if record.get(name) is not None), None)
        yield _named(record.get(column), location, None if ids is None else str(ids), where)
    if unusable is not None and not column:
        raise unusable


def _csv(location: str, suffix: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    reader = csv.DictReader((line for _, line in _lines(location)), delimiter="\t" if suffix == ".tsv" else ",")
    while True:
        before = csv.field_size_limit(_LONGEST_FIELD)  # of the whole process
        record, fault = None, ""
        try:
            record = next(reader, None)
        except csv.Error as error:
            fault = f"line {reader.line_num} of '{urls.shown(location)}' cannot be read: {error}"
        finally:
            csv.field_size_limit(before)
        if record is None and not fault:
            return
        where = f"line {reader.line_num}"
        yield where, fault or {k: v for k, v in (record or {}).items() if isinstance(k, str)}


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
