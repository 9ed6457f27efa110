"""The files of `/v1/files` in a folder that all ingress replicas and the replica of the batches share.

``files/ID/content.jsonl`` is a file and ``files/ID/file.json`` its `StoredFile`, which is written last: a file is there
whole or not at all. Names that clients give are in the record only, never in a path.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.serve.batches.records import Purpose, Record, StoredFile, is_id, new_id
from lumen_ray.serve.http import logger
from lumen_ray.serve.settings import Batches

T = TypeVar("T", bound=Record)
Clock = Callable[[], float]

_RECORD, _CONTENT = "file.json", "content.jsonl"
#: bytes that an empty file counts, as it takes a place on disk too
_LEAST_BYTES = 4096
#: seconds after which a folder without a record is one of an upload that was killed
_LEFT_OVER_S = 86_400
_COPIED_AT_ONCE = 1 << 20


def check_folder(settings: Batches) -> None:
    """Raises `UserError` if nothing can be written into the folder of files and batches."""
    probe = Path(settings.folder).expanduser() / ".writable"
    files.write_bytes(probe, b"", durable=False)
    files.remove(probe)


class DamagedRecord(Exception):
    """A file is no record of its kind. `written_at`: seconds since the epoch."""

    def __init__(self, path: Path, written_at: int):
        super().__init__(f"'{path}' is damaged")
        self.written_at = written_at


def write_record(path: Path, record: Record) -> None:
    """Writes a record, which appears whole. Raises `UserError`."""
    files.write_bytes(path, record.model_dump_json().encode())


def load_record(path: Path, kind: type[T]) -> T | None:
    """A record; None if there is none, as when another process has removed it. Raises `DamagedRecord`."""
    with files.as_user_error(path):
        try:
            with path.open("rb") as file:
                data, written_at = file.read(), int(os.fstat(file.fileno()).st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        _tell_damaged(path, written_at, error.errors()[0]["msg"])
        raise DamagedRecord(path, written_at) from None


@lru_cache(maxsize=1024)
def _tell_damaged(path: Path, written_at: int, why: str) -> None:
    """Logs it once, not at every look at the folder."""
    logger.error("'%s' is damaged and left out: %s", path, why)


def read_record(path: Path, kind: type[T]) -> T | None:
    """A record; None if there is none or it is damaged, which is logged."""
    with suppress(DamagedRecord):
        return load_record(path, kind)
    return None


def ids_in(folder: Path) -> list[str]:
    """The names in a folder, sorted, which for ids is by time of creation."""
    with files.as_user_error(folder):
        return sorted(os.listdir(folder))


def remove_left_over(folder: Path, now: float) -> None:
    """Removes a folder without a record, unless it may still get one."""
    with suppress(OSError):
        if folder.stat().st_mtime < now - _LEFT_OVER_S:
            shutil.rmtree(folder, ignore_errors=True)


class FileStore:
    """Keeps files. Methods block, and raise `UserError` for what a client did, or if the folder cannot be used."""

    def __init__(self, settings: Batches, clock: Clock = time.time):
        self._settings, self._clock = settings, clock
        self._adding = threading.Lock()
        self._folder = Path(settings.folder) / "files"
        with files.as_user_error(self._folder, "written"):
            self._folder.mkdir(parents=True, exist_ok=True)

    def check_room(self, size: int, counted: str | None = None) -> None:
        """Raises `UserError` if a file of so many bytes is too large, or the folder too full for it. `counted`: the id
        of the file itself, if it is in the folder."""
        most = self._settings.max_file_bytes
        if size > most:
            raise UserError(f"the file has {size} bytes; give at most {most}", "file_too_large", "file")
        used = sum(self._room_of(file_id) for file_id in ids_in(self._folder) if file_id != counted)
        if used + size > self._settings.max_total_bytes:
            raise UserError(
                f"the server's files have {used} bytes, of {self._settings.max_total_bytes} at most; delete files that "
                "are no longer needed, or ask the server's operator",
                "storage_full",
            )

    def _room_of(self, file_id: str) -> int:
        """Bytes of a file, of one that is not yet whole too."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return max(self.content(file_id).stat().st_size, _LEAST_BYTES)
        return 0

    def add(self, source: BinaryIO, owner: str | None, filename: str, lifetime_s: int | None = None) -> StoredFile:
        """Keeps a copy of a file of requests, from `source`'s position on. Raises `UserError` as `check_room`; of those
        that are added at the same time, none takes the room of another."""
        file_id = new_id("file-")
        content = self.content(file_id)
        try:
            with files.as_user_error(content, "written"):
                content.parent.mkdir()
                with content.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPIED_AT_ONCE)
                    target.flush()
                    os.fsync(target.fileno())
            with self._adding:
                self._check_added(file_id)
            return self._record(file_id, owner, filename, "batch", lifetime_s)
        except BaseException:
            shutil.rmtree(content.parent, ignore_errors=True)
            raise

    def _check_added(self, file_id: str) -> None:
        """`check_room` of a file that is in the folder, where it goes from if there is none."""
        content = self.content(file_id)
        try:
            self.check_room(content.stat().st_size, counted=file_id)
        except UserError:
            content.unlink()  # before the next one counts it
            raise

    def adopt(self, path: Path, file_id: str, owner: str | None, filename: str, lifetime_s: int | None) -> StoredFile:
        """Takes the output of a batch, which is on the same disk, under an id that is known before. A file of that id
        is replaced."""
        content = self.content(file_id)
        with files.as_user_error(content, "written"):
            content.parent.mkdir(exist_ok=True)
            os.replace(path, content)
        return self._record(file_id, owner, filename, "batch_output", lifetime_s)

    def _record(
        self, file_id: str, owner: str | None, filename: str, purpose: Purpose, lifetime_s: int | None
    ) -> StoredFile:
        now, kept = int(self._clock()), self._settings.retention_days * 86_400
        file = StoredFile(
            id=file_id,
            owner=owner,
            bytes=self.content(file_id).stat().st_size,
            created_at=now,
            expires_at=now + int(min(kept, lifetime_s or kept)),
            filename=filename,
            purpose=purpose,
        )
        write_record(self._folder / file_id / _RECORD, file)
        return file

    def get(self, file_id: str, owner: str | None) -> StoredFile:
        """A file of this owner. Raises `UserError` (`unknown_file`) if there is none."""
        file = self._read(file_id)
        if file is None or file.owner != owner or file.expires_at <= self._clock():
            raise UserError(f"there is no file '{file_id}'; GET /v1/files lists those there are", "unknown_file")
        return file

    def content(self, file_id: str) -> Path:
        return self._folder / file_id / _CONTENT

    def of(self, owner: str | None) -> list[StoredFile]:
        """The files of this owner, oldest first."""
        now = self._clock()
        return [file for file in self._all() if file.owner == owner and file.expires_at > now]

    def delete(self, file_id: str) -> None:
        with files.as_user_error(self._folder / file_id, "removed"), suppress(FileNotFoundError):
            (self._folder / file_id / _RECORD).unlink()
        shutil.rmtree(self._folder / file_id, ignore_errors=True)

    def sweep(self, needed: set[str]) -> None:
        """Removes what has expired, but for files that are `needed`, and the rests of uploads that were killed."""
        now = self._clock()
        for file_id in ids_in(self._folder):
            if file_id in needed:
                continue
            file = self._read(file_id)
            if file is None:
                remove_left_over(self._folder / file_id, now)
            elif file.expires_at <= now:
                self.delete(file_id)

    def _all(self) -> Iterator[StoredFile]:
        return (file for file_id in ids_in(self._folder) if (file := self._read(file_id)) is not None)

    def _read(self, file_id: str) -> StoredFile | None:
        return read_record(self._folder / file_id / _RECORD, StoredFile) if is_id(file_id, "file-") else None
