"""The lines of a batch file on their way: read and checked as requests to a server, then answered or failed.

Label jobs and the server's batches share this, so that their outputs are alike.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError
from lumen_ray.label.batch.lines import InvalidLine, parse_line
from lumen_ray.label.inputs import Item
from lumen_ray.label.reading import ImageInHand
from lumen_ray.wire.chat import ChatRequest, check_model, parse_chat, read_chat
from lumen_ray.wire.completions import completion
from lumen_ray.wire.errors import error_body, without_data
from lumen_ray.wire.limits import check_messages
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
class Line(ImageInHand):
    """A line on its way: `chat` and what the model is asked, then `records`; or its line of ``errors.jsonl``."""

    custom_id: str | None = None
    chat: ChatRequest | None = None
    prepared: Prepared | None = None
    failure: str = ""

    def error(self) -> dict[str, str]:
        named = {} if self.custom_id is None else {"image_id": self.custom_id}
        return {**super().error(), **named, "line": self.failure}

    def fail(self, error: UserError) -> None:
        """Records an error: of a line that was not asked (`InvalidLine`), or as the response of a server."""
        self.reason, self.message = error.reason, without_data(str(error))
        response = failure = None
        if isinstance(error, InvalidLine):
            self.custom_id = error.custom_id
            failure = {"code": error.reason, "message": self.message}
        else:
            number = _identity("req")
            status, body = error_body(
                error.reason, self.message, number, None if error.field is None else without_data(error.field)
            )
            response = {"status_code": status, "request_id": number, "body": body}
        line = {"id": _identity("batch_req"), "custom_id": self.custom_id, "response": response, "error": failure}
        self.failure = json.dumps(line)

    def answer(self, choices: Sequence[Answer], model: str) -> None:
        """Records the answer, a row of `ANSWER_SCHEMA`. `choices`, `model`: as of `completion`."""
        assert self.chat is not None, "lines that failed are not answered"
        body = completion(self.chat, choices, model)
        usage = body["usage"] or {}
        record: dict[str, Any] = {
            "id": _identity("batch_req"),
            "custom_id": self.custom_id,
            "status_code": 200,
            "request_id": _identity("req"),
            "body": json.dumps(body),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
        }
        self.records = [record]

    def forget(self) -> None:
        """Drops the request and its images, once it is answered."""
        self.chat = self.prepared = None


@dataclass(frozen=True)
class LineReader:
    """Reads lines as a server with these settings reads requests. `preset`, `version`, `tasks`, `largest_side`: of the
    model; `read_image`: as of `read_chat`, for the file that a line is in."""

    preset: str
    version: str
    tasks: Sequence[str]
    largest_side: int | None
    limits: Limits
    defaults: Defaults
    takes_sampling: bool
    read_image: Callable[[str], Callable[[str, str], bytes]]

    @property
    def model(self) -> str:
        return f"{self.preset}@{self.version}"

    def read(self, item: Item, data: bytes | InvalidLine) -> Line:
        """A line with what the model is asked, or failed."""
        line = Line(item, num_bytes=len(data) if isinstance(data, bytes) else 0)
        try:
            if isinstance(data, InvalidLine):
                raise data
            request = parse_line(data, item.image_id)
            line.custom_id = request.custom_id
            check_messages(request.body.get("messages"), "messages", self.limits)
            line.chat = parse_chat(request.body, self.takes_sampling)
            check_model(line.chat.model, self.preset, self.version)
            line.chat.tool_use.check_served(self.tasks)
            asked = read_chat(line.chat, self.limits, self.read_image(item.path))
            line.prepared = prepare(asked, self.limits, self.defaults, self.largest_side)
        except UserError as error:
            line.fail(error)
        return line


def _identity(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
