"""The images of a label job: where each one is, and its encoded bytes. `listing.py` finds them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError

RETRY_S = 1.0


@dataclass(frozen=True)
class Item:
    """One image: the file `path`, or a part of it.

    In a Parquet file: row `row` of row group `row_group`, in `column` (bytes, or a struct with ``bytes``). In a tar:
    `length` bytes from `offset`. `record`: of a list or table, the id that the record has or the path that it names;
    `fault`: why it names no image that could be read, else empty.
    """

    image_id: str
    path: str
    row_group: int = -1
    row: int = -1
    column: str = ""
    offset: int = -1
    length: int = -1
    record: str = ""
    fault: str = ""

    @property
    def place(self) -> tuple[str, int, int, int, str, str]:
        """What makes it another image than others: where it is and, in a list, its record; not its id, which may have
        got a number."""
        return self.path, self.row_group, self.row, self.offset, self.record, self.fault


#: of the files in which a job's plan is written
ITEM_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int64()),
        ("column", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("record", pa.string()),
        ("fault", pa.string()),
    ]
)


def read_bytes(items: Sequence[Item], reader: Reader | None = None) -> Iterator[tuple[Item, bytes | UserError]]:
    """The encoded bytes of each item, or the error of reading them; `reader`: see `Reader`."""
    reader = reader or Reader()
    for item in items:
        yield item, reader.read(item)


class Reader:
    """Reads images one by one and keeps the row group that was read last, which the next image is often in.

    A store that does not answer is asked once more after `RETRY_S` seconds.
    """

    def __init__(self) -> None:
        self._loaded: tuple[str, int] | None = None
        self._images: list[bytes | dict[str, bytes | None] | None] = []

    def read(self, item: Item) -> bytes | UserError:
        """The encoded bytes, or the error of reading them."""
        try:
            try:
                return _read(item, self)
            except files.StoreError:
                time.sleep(RETRY_S)
                return _read(item, self)
        except UserError as error:
            return _explained(error, item)
        except (ValueError, IndexError, pa.ArrowException) as error:  # no such path or row, a damaged table
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            return UserError(f"'{urls.shown(item.path)}' cannot be read: {why}", "unreadable_file")

    def image(self, item: Item) -> bytes | None:
        """The image of a row."""
        if self._loaded != (item.path, item.row_group):
            column = item.column or "image"
            with files.as_user_error(item.path), files.open_input(item.path) as file:
                table = pq.ParquetFile(file).read_row_group(item.row_group, columns=[column])
            self._images, self._loaded = table[column].to_pylist(), (item.path, item.row_group)
        image = self._images[item.row]
        return image.get("bytes") if isinstance(image, dict) else image


def _explained(error: UserError, item: Item) -> UserError:
    """The error of reading an image; of one that a list names, with where its path begins."""
    if (
        error.reason != "missing_file"
        or not item.record
        or urls.is_url(item.path)
        or item.record.startswith(("/", "file://"))
    ):
        return error
    return UserError(f"{error} (relative paths of a list or table begin at its own folder)", error.reason)


def _read(item: Item, reader: Reader) -> bytes:
    if item.fault:
        raise UserError(item.fault, "invalid_record")
    if item.row_group >= 0:
        if (image := reader.image(item)) is None:
            raise UserError(f"row '{item.image_id}' of '{urls.shown(item.path)}' has no image", "no_image")
        return image
    if item.offset < 0:
        return files.read_bytes(item.path)
    with files.as_user_error(item.path), files.open_input(item.path) as file:
        file.seek(item.offset)
        data = file.read(item.length)
    if len(data) < item.length:
        raise UserError(f"'{urls.shown(item.path)}' ends in the middle of '{item.image_id}'", "unreadable_file")
    return data
