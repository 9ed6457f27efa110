"""Files and batches as they are kept on disk, and as OpenAI's objects show them; the states of a batch."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import Any, Literal

from pydantic import ConfigDict, Field

from lumen_ray.config import Settings

Purpose = Literal["batch", "batch_output"]
#: as kept; a batch that is to be cancelled is shown as "cancelling" until it ends
Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelled"]
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
#: which state follows which; a batch whose server was killed goes on in the one that it had
_NEXT: dict[Status, frozenset[Status]] = {
    "validating": frozenset({"in_progress", "failed", "expired", "cancelled"}),
    "in_progress": frozenset({"finalizing", "failed"}),
    "finalizing": frozenset({"completed", "failed", "expired", "cancelled"}),
}
#: ids begin with the time, so that their order is that of creation; the rest cannot be guessed
_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}", re.ASCII)


def new_id(prefix: Literal["file-", "batch_"]) -> str:
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def is_id(text: str, prefix: Literal["file-", "batch_"]) -> bool:
    """Whether it could be one of ours, and so is safe as the name of a folder."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None


def output_id(batch_id: str, kind: str) -> str:
    """The id of an output file of a batch: the same each time, so that one finalized twice has one."""
    stamp = batch_id.removeprefix("batch_")[:16]
    return f"file-{stamp}{hashlib.sha256(f'{batch_id} {kind}'.encode()).hexdigest()[:16]}"


class Record(Settings):
    """Base of what is kept on disk, where a newer version may have written fields that this one does not know."""

    model_config = ConfigDict(extra="ignore")


class StoredFile(Record):
    """A file. `owner`: the name of the API key whose it is, None on a server without keys; times are seconds since the
    epoch."""

    id: str
    owner: str | None
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose

    def shown(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"object": "file", **self.model_dump(exclude={"owner"}), "status": "processed", "status_details": None}


class Batch(Record):
    """A batch as it was asked for; never changed. `output_lifetime_s`: seconds for which its output files are kept,
    None as long as others."""

    id: str
    owner: str | None
    created_at: int
    expires_at: int
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_lifetime_s: int | None = None


class Problem(Record):
    """Why a batch failed; `line`: of its file, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(Record):
    """Lines of a batch; `failed`: those in the file of errors."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchState(Record):
    """How far a batch is. `times`: when each state but the first began; `model`: that answers it now, preset@version;
    `usage`: tokens of all answers."""

    status: Status = "validating"
    times: dict[str, int] = {}
    counts: Counts = Counts()
    problems: list[Problem] = Field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    model: str | None = None
    usage: dict[str, int] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def enter(self, status: Status, now: int, **facts: Any) -> BatchState:
        """The state after this one. `facts`: other fields that change."""
        assert status in _NEXT.get(self.status, ()), f"{status} does not follow {self.status}"
        return self.with_facts(status=status, times={**self.times, status: now}, **facts)

    def with_facts(self, **facts: Any) -> BatchState:
        return self.model_copy(update=facts)


class Cancelling(Record):
    """A batch is to be cancelled, since the time `at`."""

    at: int


def shown_batch(batch: Batch, state: BatchState, cancelled_at: int | None) -> dict[str, Any]:
    """OpenAI's object. `cancelled_at`: when the batch was to be cancelled, None if it was not."""
    status = "cancelling" if cancelled_at is not None and not state.has_ended else state.status
    names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelled")
    problems = [problem.model_dump() for problem in state.problems]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": state.model,
        "errors": {"object": "list", "data": problems} if problems else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": status,
        "output_file_id": state.output_file_id,
        "error_file_id": state.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{name}_at": state.times.get(name) for name in names},
        "cancelling_at": cancelled_at,
        "request_counts": state.counts.model_dump(),
        "usage": _usage(state.usage),
        "metadata": batch.metadata,
    }


def _usage(usage: dict[str, int] | None) -> dict[str, Any] | None:
    """As batches have it, which is not as chat completions do."""
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
