"""Stores that pyarrow does not know, such as ``az://`` and ``hf://``, through fsspec's file systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.registry import registry
from pyarrow import fs


def open_store(scheme: str) -> fs.FileSystem:
    """The file system of a scheme. Raises `ImportError`, which names the library that is missing, and `ValueError` for
    an unknown scheme or without credentials."""
    return fs.PyFileSystem(_Handler(fsspec.filesystem(scheme)))


def is_known(scheme: str) -> bool:
    """Whether fsspec has a file system of this scheme, whose library may still be missing."""
    return scheme in registry or scheme in fsspec.available_protocols()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turns the errors of a store's own library into `OSError`, as which its users know failures of a store."""
    try:
        yield
    except (OSError, ValueError, TypeError, NotImplementedError):
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise OSError(f"{type(error).__name__}: {text}") from error


class _File:
    """A file of fsspec whose failures are `OSError`."""

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, *size: int) -> bytes:
        with _as_os_error():
            return self._file.read(*size)

    def write(self, data: bytes) -> int:
        with _as_os_error():
            return self._file.write(data)

    def close(self) -> None:
        with _as_os_error():
            self._file.close()


class _Handler(fs.FSSpecHandler):
    """File systems of fsspec keep what they have listed; this one sees what other processes have written since."""

    def get_file_info(self, paths: list[str]) -> Any:
        return self._fresh(super().get_file_info, paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._fresh(super().get_file_info_selector, selector)

    def open_input_file(self, path: str) -> Any:
        # without pyarrow's question whether it is a file, to which fsspec says no when the store does not answer
        with _as_os_error():
            return pa.PythonFile(_File(self.fs.open(path, "rb")), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        with _as_os_error():
            return pa.PythonFile(_File(self.fs.open(path, "wb")), mode="w")

    def _fresh(self, call: Callable[[Any], Any], given: Any) -> Any:
        with _as_os_error():
            self.fs.invalidate_cache()
            return call(given)
