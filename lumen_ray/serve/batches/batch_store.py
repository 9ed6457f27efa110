"""The batches in the folder that all ingress replicas and the replica of the batches share.

Each file has one writer. An ingress writes ``batches/ID/batch.json``, what was asked for (``new.json`` until the owner
is known to have room for it), and ``cancel.json``, when it was to be cancelled; the replica that answers batches writes
``state.json`` and ``work/``, the ledger of a label job.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.serve.batches.file_store import (
    Clock,
    DamagedRecord,
    ids_in,
    load_record,
    read_record,
    remove_left_over,
    write_record,
)
from lumen_ray.serve.batches.records import Batch, BatchState, Cancelling, Problem, is_id, new_id, shown_batch
from lumen_ray.serve.settings import Batches

_BATCH, _NEW = "batch.json", "new.json"


class BatchStore:
    """Keeps batches. Methods block, and raise `UserError` for what a client did, or if the folder cannot be used."""

    def __init__(self, settings: Batches, clock: Clock = time.time):
        self._settings, self._clock = settings, clock
        self.folder = Path(settings.folder) / "batches"
        self._ended: set[str] = set()  # ids, to read the states of others only
        self._adding, self._cancelling = threading.Lock(), threading.Lock()
        with files.as_user_error(self.folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, owner: str | None, window_s: int, **asked: Any) -> Batch:
        """A new batch. `asked`: the other fields of `Batch`. Raises `UserError` if too many of this owner's are not
        done."""
        now, most = int(self._clock()), self._settings.max_unfinished
        batch = Batch(id=new_id("batch_"), owner=owner, created_at=now, expires_at=now + window_s, **asked)
        folder = self.folder / batch.id
        with self._adding:
            try:
                write_record(folder / _NEW, batch)  # from here on other processes count it
                if self._unfinished_of(owner) > most:
                    raise UserError(
                        f"{most} batches are not done yet; wait until one is, or cancel one before another is created",
                        "too_many_batches",
                    )
                with files.as_user_error(folder, "written"):
                    (folder / _NEW).rename(folder / _BATCH)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return batch

    def _unfinished_of(self, owner: str | None) -> int:
        """The number of this owner's batches that have not ended, with those that are being created."""
        found = (read_record(self.folder / batch_id / _NEW, Batch) or self._read(batch_id) for batch_id in self._open())
        return sum(batch is not None and batch.owner == owner for batch in found)

    def get(self, batch_id: str, owner: str | None) -> Batch:
        """A batch of this owner. Raises `UserError` (`unknown_batch`) if there is none."""
        batch = self._read(batch_id)
        if batch is None or batch.owner != owner:
            raise UserError(f"there is no batch '{batch_id}'; GET /v1/batches lists those there are", "unknown_batch")
        return batch

    def newest(self, owner: str | None, before: str | None = None) -> Iterator[Batch]:
        """The batches of this owner, newest first; only those older than the one of id `before`."""
        for batch_id in reversed(ids_in(self.folder)):
            if before is None or batch_id < before:
                batch = self._read(batch_id)
                if batch is not None and batch.owner == owner:
                    yield batch

    def unfinished(self) -> Iterator[Batch]:
        """All batches that have not ended, oldest first."""
        return (batch for batch_id in self._open() if (batch := self._read(batch_id)) is not None)

    def _open(self) -> Iterator[str]:
        """The ids of batches that have not ended, oldest first."""
        ids = ids_in(self.folder)
        self._ended.intersection_update(ids)
        for batch_id in ids:
            if batch_id in self._ended:
                continue
            if self.state(batch_id).has_ended:
                self._ended.add(batch_id)
            else:
                yield batch_id

    def shown(self, batch: Batch) -> dict[str, Any]:
        """OpenAI's object."""
        return shown_batch(batch, self.state(batch.id), self.cancelling_at(batch.id))

    def state(self, batch_id: str) -> BatchState:
        """How far a batch is; one whose record is damaged has failed."""
        try:
            return load_record(self.folder / batch_id / "state.json", BatchState) or BatchState()
        except DamagedRecord as error:
            problem = Problem(
                code="damaged_record", message="what the server kept of the batch is damaged; send it again"
            )
            return BatchState(status="failed", times={"failed": error.written_at}, problems=[problem])

    def save(self, batch_id: str, state: BatchState) -> None:
        """Only for the one process that answers batches."""
        write_record(self.folder / batch_id / "state.json", state)

    def cancel(self, batch_id: str) -> None:
        """Says that a batch is to be cancelled. Raises `UserError` (`batch_ended`) if it has ended otherwise."""
        state = self.state(batch_id)
        if state.has_ended and state.status != "cancelled":
            raise UserError(
                f"batch '{batch_id}' is {state.status}; one that has ended cannot be cancelled", "batch_ended"
            )
        with self._cancelling:
            if self.cancelling_at(batch_id) is None and not state.has_ended:
                write_record(self.folder / batch_id / "cancel.json", Cancelling(at=int(self._clock())))

    def cancelling_at(self, batch_id: str) -> int | None:
        """When a batch was to be cancelled; None if it was not."""
        try:
            found = load_record(self.folder / batch_id / "cancel.json", Cancelling)
        except DamagedRecord as error:
            return error.written_at
        return None if found is None else found.at

    def work(self, batch_id: str) -> Path:
        """The folder of the ledger, until the batch has ended."""
        return self.folder / batch_id / "work"

    def remove_work(self, batch_id: str) -> None:
        shutil.rmtree(self.work(batch_id), ignore_errors=True)

    def sweep(self) -> None:
        """Removes batches that ended long ago, and what a kill left of others."""
        now = self._clock()
        for batch_id in ids_in(self.folder):
            if not is_id(batch_id, "batch_"):
                continue
            if self._read(batch_id) is None:
                remove_left_over(self.folder / batch_id, now)
                continue
            state = self.state(batch_id)
            if not state.has_ended:
                continue
            self.remove_work(batch_id)
            if max(state.times.values()) + self._settings.retention_days * 86_400 <= now:
                with suppress(OSError):
                    (self.folder / batch_id / _BATCH).unlink()
                shutil.rmtree(self.folder / batch_id, ignore_errors=True)

    def _read(self, batch_id: str) -> Batch | None:
        return read_record(self.folder / batch_id / _BATCH, Batch) if is_id(batch_id, "batch_") else None
