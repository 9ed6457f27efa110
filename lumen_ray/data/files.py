"""File access for local paths, ``s3://``, ``gs://`` and every other fsspec URL (``memory://`` in tests).

Errors: `UserError` with reason ``missing_file`` or ``unreadable_file`` for a file that cannot be read, ``disk_full`` or
``invalid_output`` for one that cannot be written; `StoreError` for a failure of the whole store (no credentials, no
such bucket, no connection), which must stop a job instead of rejecting its images one by one.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from pyarrow import fs

from lumen_ray.data.fsspec_store import is_known, open_store
from lumen_ray.data.urls import NATIVE, Location, is_url, parent, shown, split, url_of
from lumen_ray.errors import UserError, suggest

#: of the stores that messages name
SCHEMES = ("s3", "gs", "az", "hf")
_LONGEST_KEY = 1024  # bytes, of S3 and GCS alike


class StoreError(UserError):
    """The store itself cannot be used: credentials, bucket or connection."""


@lru_cache(maxsize=256)
def _store(scheme: str, bucket: str, settings: str) -> fs.FileSystem:
    if scheme not in NATIVE:
        if not is_known(scheme):
            schemes = [f"{name}://" for name in SCHEMES]
            raise StoreError(
                f"'{scheme}://' is no kind of store;{suggest(f'{scheme}://', schemes)} give a local path, or one with "
                f"{', '.join(schemes)} or the scheme of another fsspec file system",
                "unknown_store",
            )
        try:
            return open_store(scheme)
        except (ValueError, ImportError) as error:
            raise StoreError(f"'{scheme}://' paths cannot be used: {_first(error)}", "unknown_store") from None
    user, at, _ = bucket.rpartition("@")
    options: dict[str, Any] = dict(parse_qsl(settings))
    try:
        if scheme == "s3" and user == "anonymous":
            return fs.S3FileSystem(anonymous=True, **options)
        query = f"?{settings}" if settings else ""
        return fs.FileSystem.from_uri(f"{'gs' if scheme == 'gcs' else scheme}://{bucket}{query}")[0]
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(
            f"cannot open '{shown(url_of(scheme, bucket, ''))}': {_first(error)}", "unknown_store"
        ) from None


def filesystem(location: Location) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system (made once per process and bucket) and the path in it."""
    scheme, path, settings = split(location)
    if not scheme:
        return _local(), str(Path(path).expanduser().absolute())
    if scheme in ("http", "https"):
        raise UserError(
            f"'{shown(location)}' is a web address, which is neither read nor written; download it, or give its "
            "place in a store",
            "web_address",
        )
    if scheme not in NATIVE:
        return _store(scheme, "", settings), path
    bucket, slash, key = path.partition("/")
    if not bucket:
        raise StoreError(f"'{shown(location)}' names no bucket; write {scheme}://BUCKET/path", "unknown_store")
    if len(key.encode()) > _LONGEST_KEY:  # the store's response would look like expired credentials
        raise UserError(f"'{shown(location)[:80]}...' is longer than the keys of a store can be", "missing_file")
    return _store(scheme, bucket, settings), bucket.rpartition("@")[2] + slash + key


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


def _first(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:240]


@contextmanager
def as_user_error(location: Location, verb: str = "read") -> Iterator[None]:
    """Turns the errors of a file system into a `UserError` that names `location`; `verb`: read, written, moved or
    removed."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        text = str(error).upper()
        if is_url(location) and "BUCKET" in text and ("NO_SUCH_BUCKET" in text or "DOES NOT EXIST" in text):
            raise _store_error(location, error) from None
        if verb == "written":
            raise _local_error(location, verb, error) from None
        raise UserError(f"'{shown(location)}' does not exist or is not a file", "missing_file") from None
    except OSError as error:
        if is_url(location):  # after Arrow's own retries
            raise _store_error(location, error) from None
        raise _local_error(location, verb, error) from None


def _local_error(location: Location, verb: str, error: OSError) -> UserError:
    what = f"'{shown(location)}' cannot be {verb}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return UserError(f"{what}: {why}; free some space or give another output folder", "disk_full")
    why = os.strerror(error.errno) if error.errno else _first(error)  # Arrow's own text has several lines
    if verb == "read":
        return UserError(f"{what}: {why}", "unreadable_file")
    return UserError(f"{what}: {why}; give another output folder or fix this one", "invalid_output")


def _store_error(location: Location, error: BaseException) -> StoreError:
    scheme = split(location)[0]
    hint = {
        "s3": "check the bucket's name and region, and the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or a role)",
        "gs": "check the bucket's name and the credentials (GOOGLE_APPLICATION_CREDENTIALS)",
        "az": "check the container's name and the credentials (AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY)",
        "hf": "check the repository's name and the credentials (HF_TOKEN)",
    }.get("gs" if scheme == "gcs" else scheme, "check its address and credentials")
    return StoreError(f"'{shown(location)}' cannot be reached; {hint}: {_first(error)}", "store_unreachable")


def open_input(location: Location) -> Any:
    """Opens a seekable binary file, a pyarrow `NativeFile` (a context manager). Raises as described in the module."""
    with as_user_error(location):
        store, path = filesystem(location)
        if not is_url(location) and _is_special(path):
            raise UserError(f"'{shown(location)}' is a pipe or device, not a file", "unreadable_file")
        return store.open_input_file(path)


def _is_special(path: str) -> bool:
    """Whether a local path is a pipe, socket or device, of which opening may never return."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_bytes(location: Location) -> bytes:
    """Reads a whole file."""
    with as_user_error(location), open_input(location) as file:
        return file.read()


def read_text(location: Location) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Raises `UserError` (`invalid_text`) for other bytes."""
    try:
        return read_bytes(location).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"'{shown(location)}' is not UTF-8 text", "invalid_text") from None


def read_many(locations: Sequence[Location], threads: int = 32) -> Iterator[bytes | UserError]:
    """Reads many small files concurrently; their contents in order, or the error in place of a bad one."""

    def read(location: Location) -> bytes | UserError:
        try:
            return read_bytes(location)
        except StoreError:
            raise
        except UserError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, locations)


def _kind(location: Location) -> fs.FileType:
    try:
        with as_user_error(location):
            store, path = filesystem(location)
            return store.get_file_info(path).type
    except UserError as error:
        if isinstance(error, StoreError):
            raise
        return fs.FileType.NotFound  # an invalid name, or a folder without permission


def exists(location: Location) -> bool:
    return _kind(location) != fs.FileType.NotFound


def is_file(location: Location) -> bool:
    return _kind(location) == fs.FileType.File


def is_dir(location: Location) -> bool:
    """Whether it is a folder; in a bucket, whether there are files under it."""
    return _kind(location) == fs.FileType.Directory


def size(location: Location) -> int:
    """Bytes of a file; 0 if it does not exist."""
    with as_user_error(location):
        store, path = filesystem(location)
        return store.get_file_info(path).size or 0


def missing_folder(folder: Location) -> UserError:
    return UserError(f"folder '{shown(folder)}' does not exist", "missing_folder")


def list_files(folder: Location, suffixes: Iterable[str] = (), recursive: bool = False) -> list[str]:
    """Names of the files under `folder`, relative to it with ``/``, sorted; only those ending in one of `suffixes` (any
    case), all if empty. Raises `UserError` (`missing_folder`) if there is no such folder."""
    endings = tuple(s.lower() for s in suffixes)
    if not is_dir(folder):
        raise missing_folder(folder)
    with as_user_error(folder):
        store, path = filesystem(folder)
        found = store.get_file_info(fs.FileSelector(path, recursive=recursive))
    root = path.rstrip("/") + "/"
    try:
        paths = [i.path for i in found if i.type == fs.FileType.File]
    except UnicodeDecodeError as error:
        name = error.object.decode("utf-8", "backslashreplace")
        raise UserError(
            f"'{name}' has a name that is not UTF-8; rename the file or its folder", "invalid_name"
        ) from None
    names = (path.lstrip("/").removeprefix(root.lstrip("/")) for path in paths)
    return sorted(name for name in names if not endings or name.lower().endswith(endings))


def sizes(folder: Location, recursive: bool = True) -> dict[str, int]:
    """Bytes of every file under a folder, by name relative to it with ``/``; none if there is no such folder."""
    with as_user_error(folder):
        store, path = filesystem(folder)
        found = store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
    root = path.strip("/") + "/"
    return {i.path.lstrip("/").removeprefix(root): i.size for i in found if i.type == fs.FileType.File}


def states(folder: Location) -> dict[str, tuple[int, int]]:
    """Bytes and time of the last change in ns of every file directly in a folder, by name; none if there is no such
    folder."""
    with as_user_error(folder):
        store, path = filesystem(folder)
        found = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {i.base_name: (i.size, i.mtime_ns or 0) for i in found if i.type == fs.FileType.File}


def idle_folders(folder: Location, prefix: str, seconds: float) -> list[str]:
    """Names of the folders directly in `folder` that begin with `prefix` and have not changed for `seconds`, sorted;
    none in a store without modification times."""
    with as_user_error(folder):
        store, path = filesystem(folder)
        inside = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
        found = [i for i in inside if i.type == fs.FileType.Directory and i.base_name.startswith(prefix)]
        held = [store.get_file_info(fs.FileSelector(i.path, allow_not_found=True, recursive=True)) for i in found]
    idle = []
    for top, entries in zip(found, held, strict=True):
        times = [i.mtime.timestamp() for i in (top, *entries) if i.mtime]
        if times and max(times) < time.time() - seconds:
            idle.append(top.base_name)
    return sorted(idle)


@contextmanager
def open_output(location: Location) -> Iterator[Any]:
    """Opens a file of a store for writing, a pyarrow `NativeFile`. After an error a part of it may be there."""
    with as_user_error(location, "written"):
        store, path = filesystem(location)
        _make_folder(store, location)
        with store.open_output_stream(path) as stream:
            yield stream


def copy(source: Location, target: Location) -> None:
    """Copies a file from one store to another; in a bucket it appears whole or not at all."""
    with open_input(source) as stream, open_output(target) as written:
        shutil.copyfileobj(stream, written, 8 << 20)


def put(local: Location, location: Location) -> None:
    """Moves a finished local file to `location`, where it appears whole or not at all. A local `location` must be on
    the same disk."""
    if is_url(location):
        copy(local, location)
        os.unlink(local)
        return
    with as_user_error(location, "written"):
        _rename(Path(local), Path(split(location)[1]))


def write_bytes(location: Location, data: bytes, *, durable: bool = True) -> None:
    """Writes a file that appears whole or not at all; `durable` as in `write_atomically`.

    Raises `UserError` (`invalid_output`, `disk_full`) if it cannot be written.
    """
    with as_user_error(location, "written"):
        store, path = filesystem(location)
        if not is_url(location):
            write_atomically(Path(path), lambda temporary: temporary.write_bytes(data), durable=durable)
            return
        _make_folder(store, location)
        with store.open_output_stream(path) as target:
            target.write(data)


def write_atomically(path: Path, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Calls `write(temporary)` and renames the result to `path`: readers find the old file, the new one or none.

    The one way a single local file is replaced. Missing parent folders are created, and the temporary file is removed
    if anything fails. `durable`: flush it to disk before the rename, or a power cut may leave an empty file; False only
    for files that can be written again, many at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _rename(temporary, path, durable)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # on a full disk it would only take more room
        raise


_LEFT_OVER = 86_400.0  # seconds after which an unfinished folder is one of a job that was killed


def write_folder_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` with a new folder beside `path` and renames it to `path`, replacing a folder there.

    A job that is killed leaves no half-written folder under this name; what it leaves under a hidden one is removed by
    the next call, a day later at the earliest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in idle_folders(str(path.parent), f".{path.name}.", _LEFT_OVER):
        shutil.rmtree(path.parent / name, ignore_errors=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _rename(temporary: Path, path: Path, durable: bool = True) -> None:
    if durable:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def _make_folder(store: fs.FileSystem, location: Location) -> None:
    if split(location)[0] not in NATIVE:  # buckets have no folders
        store.create_dir(filesystem(parent(location))[1], recursive=True)


def make_folder(folder: Location) -> None:
    """Creates a local folder with its parents; in a bucket there is nothing to create.

    Raises `UserError` (`invalid_output`) if it is a file, or cannot be created or written.
    """
    if is_url(folder):
        return
    path = Path(filesystem(folder)[1])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(
            f"output folder '{shown(folder)}' cannot be made: it is a file; give another one", "invalid_output"
        ) from None
    except OSError as error:
        raise _local_error(folder, "made", error) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise _local_error(folder, "written", PermissionError(errno.EACCES, "")) from None


def local_folder(folder: Location) -> Path:
    """The path of an output folder that must be on a file system. Raises `UserError` (`invalid_output`) for a URL."""
    if is_url(folder):
        raise UserError(
            f"output folder '{shown(folder)}' is a URL; give a folder on a file system, on a cluster one shared by all "
            "nodes",
            "invalid_output",
        )
    return Path(split(folder)[1]).expanduser()


def move(source: Location, target: Location) -> None:
    """Renames within one store (a bucket copies on the server and deletes)."""
    with as_user_error(source, "moved"):
        store, path = filesystem(source)
        store.move(path, filesystem(target)[1])


def remove(location: Location, missing_ok: bool = True) -> None:
    """Deletes a file. Raises `UserError` if it does not exist, unless `missing_ok`."""
    with as_user_error(location, "removed"):
        store, path = filesystem(location)
        if is_file(location) or not missing_ok:
            store.delete_file(path)


def remove_empty_folder(folder: Location) -> None:
    """Deletes a local folder if it is empty."""
    if not is_url(folder):
        with suppress(OSError):
            os.rmdir(split(folder)[1])


def remove_folder(folder: Location) -> None:
    """Deletes a folder with its contents, if it exists."""
    with as_user_error(folder, "removed"):
        store, path = filesystem(folder)
        if is_dir(folder):
            store.delete_dir(path)
