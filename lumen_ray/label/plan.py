"""The plan of a label job: which images form which fragment, written while the input is listed.

``ledger/inputs-NNNNN.parquet`` holds the images of consecutive fragments. A file is written before any of its fragments
is handed out, so that a job that is killed while it lists goes on with the same fragments. ``ledger/listing.json``
says that the listing is complete; later runs then read the plan and leave the input alone.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lumen_ray.data import files, urls
from lumen_ray.data.hash_set import HashSet, hash_of
from lumen_ray.label.inputs import ITEM_SCHEMA, Item
from lumen_ray.label.listing import Listing

#: fragments of the first file of a plan; each further file has twice as many, up to the most
FIRST_FRAGMENTS, MOST_FRAGMENTS = 8, 1024
#: images of a row group of such a file, so that some of its fragments can be read without the others
_ROW_GROUP = 2048
_SCHEMA = pa.schema([("fragment", pa.int64()), *ITEM_SCHEMA])
_OLD = "inputs.parquet"  # the whole plan, of folders from before it was written in parts


@dataclass(frozen=True)
class Fragment:
    """`index`: its number in the job; `items`: its images; `part`: the file of the plan that has it. `order`: the ids
    of all its images, where `items` are only those that are asked again."""

    index: int
    items: tuple[Item, ...]
    part: str = ""
    order: tuple[str, ...] = ()

    def only(self, image_ids: Collection[str]) -> Fragment:
        """The fragment with these images only."""
        items = tuple(item for item in self.items if item.image_id in image_ids)
        return replace(self, items=items, order=tuple(item.image_id for item in self.items))


def reference(fragments: Sequence[Fragment]) -> str:
    """Where the plan has these fragments, as JSON: what travels to a worker, and waits, in place of their images."""
    places: dict[str, list[int]] = {}
    for fragment in fragments:
        places.setdefault(fragment.part, []).append(fragment.index)
    return json.dumps(places)


def read_fragments(reference: str) -> list[Fragment]:
    """The fragments of a `reference`, from any process. Raises `UserError` if the plan cannot be read."""
    found: list[Fragment] = []
    number = pc.field("fragment")
    for part, wanted in json.loads(reference).items():
        chosen = (number >= min(wanted)) & (number <= max(wanted)) & number.isin(wanted)
        with files.as_user_error(part), files.open_input(part) as file:
            found += _fragments(pq.read_table(file, filters=chosen, use_threads=False), part)
    return found


class Plan:
    """The fragments of `fragment_size` images in the ledger folder `folder`, on any store."""

    def __init__(self, folder: urls.Location, fragment_size: int = 32):
        self._folder, self._size = folder, fragment_size
        self._listing = urls.join(folder, "listing.json")

    @property
    def is_complete(self) -> bool:
        """Whether the input has been listed to its end."""
        return files.is_file(self._listing)

    @property
    def left_out(self) -> Counter[str]:
        """Number of files that are no images, by suffix, once the listing is complete."""
        return Counter(json.loads(files.read_text(self._listing))["left_out"]) if self.is_complete else Counter()

    def clear(self) -> None:
        """Removes the plan."""
        files.remove(self._listing)
        for part in self._parts():
            files.remove(part)

    def reopen(self) -> None:
        """Says that the input is to be listed again, until that is done."""
        files.remove(self._listing)

    def num_fragments(self) -> int | None:
        """The number of fragments, once the listing is complete."""
        return json.loads(files.read_text(self._listing))["fragments"] if self.is_complete else None

    def num_images(self) -> int:
        """Images planned so far."""
        return sum(self._metadata(part).num_rows for part in self._parts())

    def fragments(self, listing: Listing | None = None) -> Iterator[Fragment]:
        """All fragments in order: those planned before, then those of images in `listing` that are new.

        An image whose id another one has already, as in shard files of different sets, gets a number after it.
        """
        places, ids = HashSet(), HashSet()
        known, parts = 0, self._parts()
        for part in parts:
            for fragment in self._read(part):
                if listing is not None:
                    places.add([hash_of(_absolute(item).place) for item in fragment.items])
                    ids.add([hash_of(item.image_id) for item in fragment.items])
                known = fragment.index + 1
                yield fragment
        if listing is None:
            return
        new = self._numbered(listing, places, ids, is_first=known == 0)
        count, size = len(parts), FIRST_FRAGMENTS
        while block := _take(new, size * self._size):
            part = urls.join(self._folder, f"inputs-{count:05d}.parquet")
            made = [
                Fragment(known + n, tuple(block[start : start + self._size]), part)
                for n, start in enumerate(range(0, len(block), self._size))
            ]
            self._write(part, made)
            yield from made
            known, count, size = known + len(made), count + 1, min(2 * size, MOST_FRAGMENTS)
        facts: dict[str, Any] = {"fragments": known, "left_out": dict(listing.left_out)}
        files.write_bytes(self._listing, json.dumps(facts, indent=1).encode())

    def _numbered(self, listing: Listing, places: HashSet, ids: HashSet, is_first: bool) -> Iterator[Item]:
        """The images that are not yet planned, with ids of their own. `is_first`: none is planned, so that those met
        twice are repeated by the listing itself."""
        listed = iter(listing)
        following: dict[str, int] = {}  # of repeated ids the number to try next
        while block := _take(listed, 1024):
            planned = places.add([hash_of(item.place) for item in block])
            fresh = [item for item, is_planned in zip(block, planned, strict=True) if not is_planned]
            if is_first and len(fresh) < len(block):
                listing.left_out["listed again"] += len(block) - len(fresh)
            taken = ids.add([hash_of(item.image_id) for item in fresh])
            given: set[int] = set()  # to names with a number, in this block
            for item, is_taken in zip(fresh, taken, strict=True):
                if not is_taken:
                    yield item
                    continue
                number = following.get(item.image_id, 2)
                while (key := hash_of(f"{item.image_id}#{number}")) in given or key in ids:
                    number += 1
                given.add(key)
                following[item.image_id] = number + 1
                yield replace(item, image_id=f"{item.image_id}#{number}")
            ids.add(sorted(given))

    def _parts(self) -> list[str]:
        if not files.is_dir(self._folder):
            return []
        names = files.list_files(self._folder, (".parquet",))
        parts = sorted(name for name in names if name.startswith("inputs-"))
        return [urls.join(self._folder, name) for name in ([_OLD] if _OLD in names else []) + parts]

    def _metadata(self, part: str) -> pq.FileMetaData:
        with files.as_user_error(part), files.open_input(part) as file:
            return pq.ParquetFile(file).metadata

    def _read(self, part: str) -> Iterator[Fragment]:
        with files.as_user_error(part), files.open_input(part) as file:
            table = pq.ParquetFile(file).read()
        yield from _fragments(table, part)

    def _write(self, part: str, fragments: list[Fragment]) -> None:
        rows = [{"fragment": f.index, **asdict(item)} for f in fragments for item in f.items]
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        pq.write_table(table, buffer, compression="zstd", row_group_size=_ROW_GROUP)
        files.write_bytes(part, buffer.getvalue())


def _fragments(table: pa.Table, part: str) -> Iterator[Fragment]:
    """The fragments in a table of `_SCHEMA`, in which their rows follow each other."""
    items: list[Item] = []
    index = -1
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            fragment = row.pop("fragment")
            if fragment != index and items:
                yield Fragment(index, tuple(items), part)
                items = []
            index = fragment
            items.append(Item(**row))
    if items:
        yield Fragment(index, tuple(items), part)


def _absolute(item: Item) -> Item:
    """The item of a plan, with a path that does not depend on the current folder: older plans have such."""
    return replace(item, path=urls.absolute(item.path))


def _take(items: Iterator[Item], number: int) -> list[Item]:
    return [item for _, item in zip(range(number), items, strict=False)]
