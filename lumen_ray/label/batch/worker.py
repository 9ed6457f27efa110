"""Answers the lines of a batch file: parsed, checked and answered by the same code as a server's requests."""

from __future__ import annotations

import json
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lumen_ray.answer import Answer
from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Shown
from lumen_ray.label.batch.images import image_reader
from lumen_ray.label.batch.lines import InvalidLine, parse_line, read_lines
from lumen_ray.label.inputs import RETRY_S, Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.plan import Fragment
from lumen_ray.label.reading import ImageInHand
from lumen_ray.label.workers import LabelActor, Labeller, WorkerSettings
from lumen_ray.wire.chat import ChatRequest, check_model, parse_chat, read_chat
from lumen_ray.wire.completions import completion
from lumen_ray.wire.errors import error_body, without_data
from lumen_ray.wire.requests import Prepared, prepare
from lumen_ray.wire.settings import Defaults, Limits

#: the answered lines of a fragment; lines that failed are in the ledger's entry
ANSWER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("custom_id", pa.string()),
        ("status_code", pa.int32()),
        ("request_id", pa.string()),
        ("body", pa.string()),  # the response, as JSON
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ]
)


@dataclass
class _Line(ImageInHand):
    """A line on its way: `chat` and what the engine is asked, then `records`; or its line of ``errors.jsonl``."""

    custom_id: str | None = None
    chat: ChatRequest | None = None
    prepared: Prepared | None = None
    failure: str = ""

    def error(self) -> dict[str, str]:
        named = {} if self.custom_id is None else {"image_id": self.custom_id}
        return {**super().error(), **named, "line": self.failure}

    def fail(self, error: UserError) -> None:
        """Records an error: of a line that is no request, or as the response of a server."""
        self.reason, self.message = error.reason, without_data(str(error))
        response = failure = None
        if isinstance(error, InvalidLine):
            failure = {"code": error.reason, "message": self.message}
        else:
            number = _identity("req")
            status, body = error_body(
                error.reason, self.message, number, None if error.field is None else without_data(error.field)
            )
            response = {"status_code": status, "request_id": number, "body": body}
        line = {"id": _identity("batch_req"), "custom_id": self.custom_id, "response": response, "error": failure}
        self.failure = json.dumps(line)


class BatchLabeller(Labeller):
    """A model that answers the lines of a batch file.

    Limits are those of a server with default settings; the settings' threshold and lengths are the defaults of
    requests. Sampling is honoured.
    """

    def __init__(self, settings: WorkerSettings):
        super().__init__(settings)
        self.ledger = Ledger(settings.output, ANSWER_SCHEMA)
        self._limits = Limits()
        self._defaults = Defaults(**self._run_settings())

    def _answered(self, fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, list[ImageInHand]]]:
        """The fragments with all their lines answered. The next lines are read while the model has these."""
        size = self.settings.batch_size
        batches = [
            (fragment, fragment.items[start : start + size], start + size >= len(fragment.items))
            for fragment in fragments
            for start in range(0, len(fragment.items), size)
        ]
        coming: Future[list[_Line]] | None = None
        answered: list[ImageInHand] = []
        for number, (fragment, items, is_last) in enumerate(batches):
            lines = self._read_lines(items) if coming is None else coming.result()
            if number + 1 < len(batches):
                coming = self._reader.submit(self._read_lines, batches[number + 1][1])
            began = time.monotonic()
            self._answer_lines([line for line in lines if not line.reason])
            self._busy_seconds += time.monotonic() - began
            for line in lines:
                line.chat = line.prepared = None
            answered += lines
            if is_last:
                yield fragment, answered
                answered = []

    def _read_lines(self, items: Sequence[Item]) -> list[_Line]:
        try:
            found = list(read_lines(items))
        except files.StoreError:
            time.sleep(RETRY_S)
            found = list(read_lines(items))
        if self._decoders is None:
            return [self._read_line(item, data) for item, data in found]
        return list(self._decoders.map(lambda pair: self._read_line(*pair), found))

    def _read_line(self, item: Item, data: bytes | InvalidLine) -> _Line:
        """A line with what the engine is asked, or failed."""
        line = _Line(item)
        try:
            if isinstance(data, InvalidLine):
                raise data
            request = parse_line(data, item.image_id)
            line.custom_id = request.custom_id
            line.chat = parse_chat(request.body, takes_sampling=True)
            check_model(line.chat.model, self.engine.preset, self.engine.version)
            line.chat.tool_use.check_served(self.engine.tasks)
            asked = read_chat(line.chat, self._limits, image_reader(item.path))
            line.prepared = prepare(asked, self._limits, self._defaults, self.engine.largest_side)
        except InvalidLine as error:
            line.custom_id = error.custom_id
            line.fail(error)
        except UserError as error:
            line.fail(error)
        return line

    def _answer_lines(self, lines: Sequence[_Line]) -> None:
        """Fills in the records of lines. Those with equally long answers share a call of the engine."""
        groups: dict[int, list[_Line]] = {}
        for line in lines:
            assert line.prepared is not None, "lines that failed are not answered"
            groups.setdefault(line.prepared.max_new_tokens, []).append(line)
        for max_new_tokens, group in groups.items():
            self._answer_group(group, max_new_tokens)

    def _answer_group(self, lines: Sequence[_Line], max_new_tokens: int) -> None:
        """A group that fails is retried line by line."""
        prepared = [line.prepared for line in lines if line.prepared is not None]
        shown: list[Shown] = [one.shown for one in prepared]
        try:
            options = {**self._run_settings(), "max_new_tokens": max_new_tokens}
            answers = self.engine.run(shown, [list(one.requests) for one in prepared], **options)
        except Exception as error:  # one line must not stop the others
            if len(lines) > 1:
                for line in lines:
                    self._answer_group([line], max_new_tokens)
            elif isinstance(error, UserError):
                lines[0].fail(error)
            else:
                where = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                lines[0].fail(UserError(what, "internal_error"))
                lines[0].reason = "model_error"
            return
        for line, choices in zip(lines, answers, strict=True):
            assert line.prepared is not None, "lines that failed are not answered"
            line.records = [self._record(line, choices or line.prepared.known)]

    def _record(self, line: _Line, choices: Sequence[Answer]) -> dict[str, Any]:
        """The row of `ANSWER_SCHEMA`."""
        assert line.chat is not None, "lines that failed are not answered"
        body = completion(line.chat, choices, f"{self.engine.preset}@{self.engine.version}")
        usage = body["usage"] or {}
        return {
            "id": _identity("batch_req"),
            "custom_id": line.custom_id,
            "status_code": 200,
            "request_id": _identity("req"),
            "body": json.dumps(body),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
        }


class BatchActor(LabelActor, BatchLabeller):
    """A `BatchLabeller` of Ray Data's actor pool."""


def _identity(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
