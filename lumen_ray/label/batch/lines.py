"""The lines of a batch file: ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``.

The file is read line by line. A line that is no request is one that fails; it does not end the listing.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.hash_set import HashSet, hash_of
from lumen_ray.errors import UserError
from lumen_ray.label.inputs import Item
from lumen_ray.label.listing import Listing
from lumen_ray.wire.chat import CHAT_URL
from lumen_ray.wire.errors import without_data

#: bytes of the longest line; images are in it, in base64
LONGEST_LINE = 64 << 20
_SUFFIXES = (".jsonl", ".ndjson")
_LISTED_AT_ONCE = 1024
_SAMPLE_BYTES = 1 << 20


class InvalidLine(UserError):
    """Why a line is not asked: mostly that it is no request. `custom_id`: None if it has none."""

    def __init__(self, message: str, reason: str, custom_id: str | None = None):
        super().__init__(message, reason)
        self.custom_id = custom_id


@dataclass(frozen=True)
class BatchLine:
    """A line that asks for a chat completion: its id, and the `body` of the request, not checked yet."""

    custom_id: str
    body: dict[str, Any]


def parse_line(data: bytes, where: str) -> BatchLine:
    """The request in a line. Raises `InvalidLine`, which names `where` the line is."""
    record = _record(data)
    custom_id = _custom_id(record)
    if record is None:
        raise InvalidLine(f"{where} is not a JSON object; write one request per line", "invalid_json")
    if custom_id is None:
        raise InvalidLine(
            f"{where} has no 'custom_id'; give a text that no other line has, by which its answer is found",
            "missing_custom_id",
        )
    method, url, body = record.get("method"), record.get("url"), record.get("body")
    if method != "POST":
        shown = without_data(json.dumps(method))
        raise InvalidLine(f"'method' of {where} is {shown}; give 'POST'", "unknown_method", custom_id)
    if url != CHAT_URL:
        shown = without_data(json.dumps(url))
        raise InvalidLine(f"'url' of {where} is {shown}; give '{CHAT_URL}'", "unknown_url", custom_id)
    if not isinstance(body, dict):
        raise InvalidLine(f"'body' of {where} is not a JSON object; give a chat request", "invalid_request", custom_id)
    return BatchLine(custom_id, body)


def _record(data: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _custom_id(record: dict[str, Any] | None) -> str | None:
    """The id of a line; None if it has none that UTF-8 can hold."""
    given = (record or {}).get("custom_id")
    if not isinstance(given, str) or not given:
        return None
    try:
        given.encode()
    except UnicodeEncodeError:
        return None
    return given


class RequestListing(Listing):
    """The lines of a batch file but blank ones, each an `Item` with its place in the file; its id is "line N". A line
    whose `custom_id` an earlier one has is an item with a fault.

    An iteration raises `UserError` if the file has no line.
    """

    def check(self) -> None:
        """Raises `UserError` if there is no such file (`missing_input`), or it is none of JSON lines."""
        if not files.is_file(self.source):
            raise UserError(
                f"batch file '{urls.shown(self.source)}' does not exist; give a .jsonl file of chat requests",
                "missing_input",
            )
        if not urls.base_name(self.source).lower().endswith(_SUFFIXES):
            raise UserError(
                f"'{urls.shown(self.source)}' is not a batch file; give a .jsonl file of chat requests", "invalid_input"
            )

    def __iter__(self) -> Iterator[Item]:
        self.check()
        location = urls.absolute(self.source)
        lines, known, empty = _lines(location), HashSet(), True
        while block := list(itertools.islice(lines, _LISTED_AT_ONCE)):
            empty = False
            hashes = [hash_of(line.custom_id if line.custom_id is not None else line.number) for line in block]
            for line, is_known in zip(block, known.add(hashes), strict=True):
                fault = f"an earlier line has the custom_id of line {line.number} already; give each its own"
                yield Item(
                    f"line {line.number}",
                    location,
                    offset=line.offset,
                    length=line.length,
                    fault=fault if is_known else "",
                )
        if empty:
            raise UserError(f"batch file '{urls.shown(location)}' has no request", "empty_input")


@dataclass(frozen=True)
class _Place:
    """A line of a file: its number from 1, its bytes from `offset` on and its id, None if it has none."""

    number: int
    offset: int
    length: int
    custom_id: str | None


def _lines(location: str) -> Iterator[_Place]:
    with files.as_user_error(location), files.open_input(location) as file:
        reader, offset = io.BufferedReader(file, 1 << 20), 0
        for number in itertools.count(1):
            line = reader.readline(LONGEST_LINE + 1)
            if not line:
                return
            length, end = len(line), line[-1:]
            while end != b"\n" and (rest := reader.readline(LONGEST_LINE)):  # too long to be read at once
                length, end = length + len(rest), rest[-1:]
            if length > LONGEST_LINE:
                yield _Place(number, offset, length, None)
            elif line.strip():
                yield _Place(number, offset, length, _custom_id(_record(line)))
            offset += length


def read_lines(items: Sequence[Item]) -> Iterator[tuple[Item, bytes | InvalidLine]]:
    """The bytes of lines of one file, or why they are no request. Raises `UserError` if the file cannot be read."""
    if not items:
        return
    with files.as_user_error(items[0].path), files.open_input(items[0].path) as file:
        for item in items:
            if item.length > LONGEST_LINE:
                problem = f"{item.image_id} has {item.length} bytes; give at most {LONGEST_LINE}"
                yield item, InvalidLine(problem, "line_too_long")
                continue
            file.seek(item.offset)
            data = file.read(item.length)
            if item.fault:
                yield item, InvalidLine(item.fault, "duplicate_custom_id", _custom_id(_record(data)))
            else:
                yield item, data


def fingerprint(requests: str | Path) -> str:
    """Identifies the content of the file without reading it whole, as the plan has places in it: size and both ends."""
    size = files.size(requests)
    digest = hashlib.sha256(f"{size}\n".encode())
    with files.as_user_error(requests), files.open_input(requests) as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
