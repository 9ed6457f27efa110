"""Errors in rows of shards during training, with the place of the row."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lumen_ray.errors import UserError


class RowPlace(NamedTuple):
    """A row of a shard folder: Parquet file, and 0-based numbers of the row group and of the row in it."""

    file: str
    row_group: int
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}"


@contextmanager
def row_named(place: RowPlace, image_id: str) -> Iterator[None]:
    """Turns an error into a `UserError` that names the row, and where in the code it was raised unless it is a
    `UserError`."""
    try:
        yield
    except MemoryError:  # not the row's fault
        raise
    except Exception as error:
        raise UserError(
            f"{place} (image {image_id}) cannot be trained on: {_reason(error)}; mend or remove it and prepare the "
            "shards again ('lumen-ray data lint' finds many such rows)",
            "broken_row",
        ) from error


def _reason(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, UserError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}{': ' + text if text else ''}"
