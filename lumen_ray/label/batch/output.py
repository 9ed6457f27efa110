"""The output of a batch: ``output.jsonl`` and ``errors.jsonl`` in OpenAI's format, in the order of the input."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.label.ledger import Ledger

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"


def finish(ledger: Ledger) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes both files of a job whose lines are all done; returns the ledger's totals and the tokens, as of
    `write_outputs`."""
    ledger.remove_leftovers()
    totals, usage = ledger.totals(), write_outputs(ledger)
    planned = ledger.plan().num_images()
    assert totals["images"] == totals["labelled"] + totals["errors"] == planned, f"{totals} of {planned} lines"
    return totals, usage


def write_outputs(ledger: Ledger) -> dict[str, Any]:
    """Writes both files from the ledger's finished fragments, a fragment at a time; each appears whole. Returns the
    tokens of all answers, as OpenAI's ``usage``."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    _write(urls.join(ledger.output, OUTPUT), _answers(ledger, usage))
    _write(urls.join(ledger.output, ERRORS), _errors(ledger))
    return {**usage, "total_tokens": sum(usage.values())}


def _answers(ledger: Ledger, usage: dict[str, int]) -> Iterator[str]:
    for table in ledger.tables():
        for row in table.to_pylist():
            for name in usage:
                usage[name] += row[name] or 0
            start = json.dumps({name: row[name] for name in ("id", "custom_id")})
            response = json.dumps({name: row[name] for name in ("status_code", "request_id")})
            # the body is JSON already
            yield f'{start[:-1]}, "response": {response[:-1]}, "body": {row["body"]}}}, "error": null}}\n'


def _errors(ledger: Ledger) -> Iterator[str]:
    for _, entry in ledger.entries():
        for error in entry["errors"]:
            yield error["line"] + "\n"


def _write(location: str, lines: Iterator[str]) -> None:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines)

    if not urls.is_url(location):
        with files.as_user_error(location, "written"):
            files.write_atomically(Path(files.filesystem(location)[1]), write)
        return
    descriptor, name = tempfile.mkstemp(suffix=".jsonl")
    os.close(descriptor)
    try:
        write(Path(name))
        files.put(name, location)
    finally:
        Path(name).unlink(missing_ok=True)
