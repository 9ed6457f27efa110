"""JSON files with long arrays, written item by item."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


class JsonObject:
    """A JSON object whose long arrays are written item by item, several at the same time.

    head: its other keys. The first of `arrays` goes straight into the file, the others through files beside it.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], arrays: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        start = json.dumps(head)[:-1]
        self._file.write(start + (", " if head else ""))
        self._paths = {name: path.with_name(f".{path.name}.{name}.tmp") for name in arrays[1:]}
        self._files: dict[str, IO[str]] = {arrays[0]: self._file}
        self._files |= {name: part.open("w+", encoding="utf-8") for name, part in self._paths.items()}
        for name, file in self._files.items():
            file.write(f"{json.dumps(name)}: [")
        self._empty = set(arrays)

    def add(self, array: str, item: Any) -> None:
        """Appends an item to an array."""
        self._files[array].write(("\n" if array in self._empty else ",\n") + json.dumps(item))
        self._empty.discard(array)

    def close(self) -> None:
        """Completes the file."""
        self._file.write("]")
        for name, part in self._paths.items():
            self._files[name].seek(0)
            self._file.write(", ")
            shutil.copyfileobj(self._files[name], self._file, 1 << 20)
            self._file.write("]")
            self._files[name].close()
            part.unlink()
        self._file.write("}")
        self._file.close()


class JsonList:
    """A JSON array, written item by item."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[")
        self._empty = True

    def add(self, item: Any) -> None:
        """Appends an item."""
        self._file.write(("\n" if self._empty else ",\n") + json.dumps(item))
        self._empty = False

    def close(self) -> None:
        """Completes the file."""
        self._file.write("]")
        self._file.close()
