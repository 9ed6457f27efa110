"""The work on one batch on disk: its lines checked, its fragments published, its output written.

Plan, ledger and output are those of `lumen-ray label --input-jsonl`. All of it goes on where a killed process was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumen_ray.errors import UserError
from lumen_ray.label.batch.lines import InvalidLine, RequestListing, fingerprint, parse_line, read_lines
from lumen_ray.label.batch.output import ERRORS, OUTPUT, finish
from lumen_ray.label.batch.requests import ANSWER_SCHEMA, Line
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.plan import Fragment
from lumen_ray.serve.batches.records import Counts, Problem
from lumen_ray.wire.errors import without_data

#: lines that are published together, and at most answered again after a kill
FRAGMENT_LINES = 32
#: errors that a batch shows of its file
_MOST_PROBLEMS = 100


class BatchWork:
    """The lines of `content`, a file of requests, and the ledger in `folder`. Methods block."""

    def __init__(self, content: Path, folder: Path):
        self._listing = RequestListing(content)
        self.ledger = Ledger(folder, ANSWER_SCHEMA)

    def validate(self, max_lines: int, max_line_bytes: int) -> tuple[list[Problem], int]:
        """Plans all lines; returns why the batch cannot be answered, at most `_MOST_PROBLEMS`, and the number of lines.

        A request that a server would refuse is no problem here: it is answered with its error."""
        problems: list[Problem] = []
        total = 0
        try:
            self._listing.check()
            self.ledger.open({"input": self._listing.source, "batch": fingerprint(self._listing.source)})
            plan = self.ledger.plan(FRAGMENT_LINES)
            for fragment in plan.fragments(None if plan.is_complete else self._listing):
                total += len(fragment.items)
                if total > max_lines:
                    message = f"the file has more than {max_lines} requests; divide it into several"
                    return [Problem(code="too_many_lines", message=message)], total
                problems += _problems(fragment, max_line_bytes)
                if len(problems) >= _MOST_PROBLEMS:
                    return problems[:_MOST_PROBLEMS], total
        except UserError as error:
            if error.reason not in ("empty_input", "missing_input", "missing_file"):
                raise  # about the server's folder
            code = {"empty_input": "empty_file"}.get(error.reason, "unknown_file")
            message = "the file has no request" if code == "empty_file" else "the file has been deleted"
            problems.append(Problem(code=code, message=message))
        return problems, total

    def counts(self, total: int) -> Counts:
        """Of all fragments that are done."""
        totals = self.ledger.totals()
        return Counts(total=total, completed=totals["labelled"], failed=totals["errors"])

    def waiting(self) -> Iterator[Fragment]:
        """The fragments that are not done."""
        done = self.ledger.done()
        return (fragment for fragment in self.ledger.plan(FRAGMENT_LINES).fragments() if fragment.index not in done)

    def publish(self, fragment: Fragment, lines: Sequence[Line]) -> None:
        records = [record for line in lines for record in line.records]
        self.ledger.publish(fragment.index, len(lines), records, [line.error() for line in lines if line.reason])

    def finish(self) -> tuple[dict[str, Any], dict[str, Any], Path, Path]:
        """Writes the output; returns the ledger's totals, the tokens, and the files of answers and of errors."""
        totals, usage = finish(self.ledger)
        folder = Path(self.ledger.output)
        return totals, usage, folder / OUTPUT, folder / ERRORS


def read_item(item: Item) -> bytes | InvalidLine:
    """The bytes of a line."""
    ((_, data),) = read_lines([item])
    return data


def not_asked(item: Item, code: str, message: str) -> Line:
    """A line that is left out, with its `custom_id`."""
    line = Line(item)
    line.fail(InvalidLine(message, code, parse_line(_bytes(item), item.image_id).custom_id))
    return line


def _bytes(item: Item) -> bytes:
    data = read_item(item)
    assert isinstance(data, bytes), "lines of a batch that is answered are valid"
    return data


def _problems(fragment: Fragment, max_line_bytes: int) -> list[Problem]:
    """The lines of a fragment that are no requests."""
    found = []
    for item, data in read_lines(fragment.items):
        try:
            if isinstance(data, InvalidLine):
                raise data
            if len(data) > max_line_bytes:
                message = f"{item.image_id} has {len(data)} bytes; give at most {max_line_bytes}"
                raise InvalidLine(message, "line_too_long")
            parse_line(data, item.image_id)
        except InvalidLine as error:
            number = int(item.image_id.removeprefix("line "))
            found.append(Problem(code=error.reason, message=without_data(str(error)), line=number))
    return found
