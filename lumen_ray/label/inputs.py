"""The images to label, of a folder, a glob or a shard folder: listed without opening them, read when needed."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data.pictures import SUFFIXES, split_pictures
from lumen_ray.errors import UserError

_NOT_SHARDS = ("rejected.parquet", "errors.parquet")


@dataclass(frozen=True)
class Item:
    """One image: a file, or row `row` of row group `row_group` of a shard file."""

    image_id: str
    path: str
    row_group: int = -1
    row: int = -1

    @property
    def place(self) -> tuple[str, int, int]:
        """Where it is, without its id."""
        return self.path, self.row_group, self.row


@dataclass(frozen=True)
class Inputs:
    """`items`: the images found; `left_out`: number of other files by suffix, hidden ones not counted."""

    items: list[Item]
    left_out: Counter[str] = field(default_factory=Counter)


def find_inputs(source: str | Path, exclude: Path | None = None) -> Inputs:
    """The images of `source`, sorted; those under the folder `exclude` are left out.

    source: a folder of images (searched recursively; ids are paths relative to it), a folder of shard Parquet files
    (ids are the rows' ids), a glob, or one file. Raises `UserError` if it does not exist or holds no image.
    """
    text, path = str(source), Path(source)
    if path.is_dir():
        shards = sorted(p for p in path.glob("*.parquet") if p.name not in _NOT_SHARDS and not p.name.startswith("."))
        if shards:
            return Inputs([item for shard in shards for item in _shard_items(shard)])
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        found = {name: path / name for name in names}
    elif path.is_file():
        return Inputs(_shard_items(path) if path.suffix == ".parquet" else [Item(path.name, text)])
    elif any(c in text for c in "*?["):
        found = {p: Path(p) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()}
    else:
        raise UserError(
            f"input '{source}' does not exist; give a folder of images, a shard folder "
            "or a glob such as 'photos/**/*.jpg'",
            "missing_input",
        )
    if exclude is not None:
        inside = exclude.resolve()
        found = {name: file for name, file in found.items() if inside not in file.resolve().parents}
    pictures, left_out = split_pictures(found)
    if not pictures:
        raise UserError(f"input '{source}' holds no image; file types read: {', '.join(SUFFIXES)}", "empty_input")
    return Inputs([Item(name, str(found[name])) for name in pictures], left_out)


def _shard_items(shard: Path) -> list[Item]:
    """The rows of a shard file that have an image; reads only ids and heights."""
    try:
        file = pq.ParquetFile(shard)
    except pa.ArrowInvalid:
        raise UserError(f"'{shard}' is not a Parquet file; write it again or remove it", "invalid_input") from None
    missing = {"image_id", "image", "height"} - set(file.schema_arrow.names)
    if missing:
        raise UserError(
            f"'{shard}' is not a shard file: it lacks the column(s) {', '.join(sorted(missing))}; "
            "write shards with `lumen-ray prepare`",
            "invalid_input",
        )
    items = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["image_id", "height"])
        columns = zip(table["image_id"].to_pylist(), table["height"].to_pylist(), strict=True)
        # text-only rows have no height
        items += [Item(name, str(shard), group, row) for row, (name, height) in enumerate(columns) if height]
    return items


def read_bytes(items: Sequence[Item]) -> Iterator[tuple[Item, bytes | UserError]]:
    """The encoded bytes of each item, or the error of reading them.

    A shard's row group is read once for all its items.
    """
    images: list[bytes | None] = []
    loaded: tuple[str, int] | None = None
    for item in items:
        data: bytes | None
        try:
            if item.row_group < 0:
                data = Path(item.path).read_bytes()
            else:
                if loaded != (item.path, item.row_group):
                    table = pq.ParquetFile(item.path).read_row_group(item.row_group, columns=["image"])
                    images, loaded = table["image"].to_pylist(), (item.path, item.row_group)
                data = images[item.row]
        except (OSError, pa.ArrowException) as error:
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            yield item, UserError(f"'{item.path}' cannot be read: {why}", "unreadable_file")
            continue
        if data is None:
            yield item, UserError(f"row '{item.image_id}' of '{item.path}' has no image", "no_image")
        else:
            yield item, data
