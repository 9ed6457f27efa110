"""The images to label, of a folder, a glob or a shard folder: listed without opening them, read when needed."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_NOT_SHARDS = ("rejected.parquet", "errors.parquet")


@dataclass(frozen=True)
class Item:
    """One image: a file, or row `row` of row group `row_group` of a shard file."""

    image_id: str
    path: str
    row_group: int = -1
    row: int = -1


def find_inputs(source: str | Path, exclude: Path | None = None) -> list[Item]:
    """The images of `source`, sorted; those under the folder `exclude` are left out.

    source: a folder of images (searched recursively; ids are paths relative to it), a folder of shard Parquet files
    (ids are the rows' ids), a glob, or one file. Raises `UserError` if it does not exist or holds no image.
    """
    text, path = str(source), Path(source)
    if path.is_dir():
        shards = sorted(p for p in path.glob("*.parquet") if p.name not in _NOT_SHARDS)
        if shards:
            return [item for shard in shards for item in _shard_items(shard)]
        items = [Item(p.relative_to(path).as_posix(), str(p)) for p in sorted(path.rglob("*")) if _is_image(p)]
    elif path.is_file():
        items = _shard_items(path) if path.suffix == ".parquet" else [Item(path.name, text)]
    elif any(c in text for c in "*?["):
        items = [Item(p, p) for p in sorted(glob.glob(text, recursive=True)) if _is_image(Path(p))]
    else:
        raise UserError(
            f"input '{source}' does not exist; give a folder of images, a shard folder "
            "or a glob such as 'photos/**/*.jpg'",
            "missing_input",
        )
    if exclude is not None:
        items = [item for item in items if exclude.resolve() not in Path(item.path).resolve().parents]
    if not items:
        raise UserError(f"input '{source}' holds no image; file types read: {', '.join(EXTENSIONS)}", "empty_input")
    return items


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


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
