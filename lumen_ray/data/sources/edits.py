"""Edit triples (image, instruction, edited image) as a source: InstructPix2Pix's folders, and tables.

A folder has subfolders with a ``prompt.json`` (its `edit` is the instruction) and images ``<seed>_0.jpg`` (before) and
``<seed>_1.jpg`` (after). A table (csv, tsv, jsonl, parquet) has a column for each of the three. A triple becomes a row
of task `edit`: `image`, `target_image`, and the instruction as a message of one user turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lumen_ray.data import files, patterns, urls
from lumen_ray.data.pictures import distinct_names, is_hidden, is_picture
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources import tables
from lumen_ray.data.sources.base import Listing, Outcome, Rejected, Source, reject
from lumen_ray.data.sources.record_parsing import as_mapping, check_choice, clean_text
from lumen_ray.errors import UserError
from lumen_ray.structures import Size

IMAGE_COLUMNS = ("image", "input_image", "original_image", "source_image", "source_img", "input", "before")
INSTRUCTION_COLUMNS = ("instruction", "edit_prompt", "edit", "edit_instruction", "prompt", "text")
TARGET_COLUMNS = ("target_image", "edited_image", "target_img", "output_image", "target", "output", "after")
#: required agreement of the two images: equal size, equal aspect ratio (within 2 percent), or none
SIZES = ("same", "aspect", "any")
Triple = tuple[Any, Any, Any]  # image, instruction and edited image, unchecked
_ASPECT_TOLERANCE = 0.02
_PROMPT = "prompt.json"
_SIDE = re.compile(r"(.+)_([01])(\.[^.]+)")


@dataclass
class EditsSource(Source):
    """`data`: folders and tables; `images`: folder of the images if tables hold paths; `sizes`: one of `SIZES`; each
    column is by default the first with a usual name."""

    data: list[str]
    images: str | None = None
    image_column: str | None = None
    instruction_column: str | None = None
    target_column: str | None = None
    sizes: str = "aspect"
    kind = "edits"
    row_kind = "edits"

    def read_listing(self) -> Listing:
        check_choice("sizes", self.sizes, SIZES)
        if self.images is not None:
            self.images = urls.absolute(self.images)
            if not files.is_dir(self.images):
                raise UserError(f"image folder '{self.images}' does not exist", "missing_images")
        records: list[Any] = []
        rejected: list[Rejected] = []
        total = 0
        locations = [urls.absolute(path) for pattern in self.data for path in patterns.expand(pattern)]
        names = distinct_names(locations)
        for location in dict.fromkeys(locations):
            found, bad, number = self._records(location, names[location])
            records += found
            rejected += bad
            total += number
        columns = self._columns()
        tables.link_images([r for r in records if "folder" not in r], columns["image"], columns["target"])
        most = max((r.get("records", 1) for r in records), default=1)
        return Listing(records, {"edits": total}, rejected=rejected, rows_per_record=most)

    def _records(self, location: str, name: str) -> tuple[list[Any], list[Rejected], int]:
        """(records, rejected ones, number of triples) of a folder or table; `name`: its part of the records' ids."""
        if files.is_dir(location):
            return list_folder(location, name)
        chunks = tables.chunks(location)
        if chunks:
            names = tables.column_names(chunks[0])
            for what, (wanted, usual) in self._columns().items():
                tables.pick_column(names, wanted, usual, what)
        return chunks, [], sum(chunk["records"] for chunk in chunks)

    def _columns(self) -> dict[str, tuple[str | None, tuple[str, ...]]]:
        return {
            "image": (self.image_column, IMAGE_COLUMNS),
            "instruction": (self.instruction_column, INSTRUCTION_COLUMNS),
            "target": (self.target_column, TARGET_COLUMNS),
        }

    def rows(self, record: Any, shared: Any) -> Iterator[Outcome]:
        if "folder" in record:
            folder, origin = urls.join(record["folder"], record["inside"]), record["origin"]
            # file names repeat from folder to folder
            yield self._outcome(origin, lambda: _read_folder(folder, record), folder, lambda name: origin, None)
            return
        for place, (origin, value) in enumerate(tables.read_chunk(record)):
            identity = partial(tables.image_id, record, place, origin)
            yield self._outcome(origin, partial(self._cells, value), self.images, identity, record)

    def _cells(self, value: Any) -> Triple:
        record = as_mapping(value)
        image, instruction, target = (tables.cell(record, wanted, usual) for wanted, usual in self._columns().values())
        return image, instruction, target

    def _outcome(
        self,
        origin: str,
        read: Callable[[], Triple],
        folder: str | None,
        identity: Callable[[str | None], str],
        chunk: tables.Chunk | None,
    ) -> Outcome:
        """The outcome of a triple; `identity`: the row's id from the image's name; `chunk`: of a table."""
        try:
            image, instruction, target = read()
            text = clean_text(instruction, "the instruction")
            name, before, size = tables.load_image(image, folder, chunk=chunk)
            _, after, edited = tables.load_image(target, folder, "the edited image", chunk)
            check_sizes(size, edited, self.sizes)
        except UserError as error:
            return Outcome(rejected=[reject("edits", "", origin, error)])
        message = make_message("edit", text, None)
        row = make_row(identity(name), before, size, self.kind, tasks=["edit"], messages=[message], target_image=after)
        return Outcome(row)


def check_sizes(size: Size, edited: Size, rule: str) -> None:
    """Raises `UserError` (`size_mismatch`) if the (height, width) of the two images do not agree by `rule`."""
    shape, other = size[1] / size[0], edited[1] / edited[0]
    same_shape = abs(shape - other) <= _ASPECT_TOLERANCE * shape
    if {"same": size == edited, "aspect": same_shape, "any": True}[rule]:
        return
    wanted = "size" if rule == "same" else "shape"
    raise UserError(
        f"the image has {size[1]}x{size[0]} pixels, the edited one {edited[1]}x{edited[0]}: not the same {wanted}",
        "size_mismatch",
    )


def list_folder(folder: str, name: str) -> tuple[list[dict[str, str]], list[Rejected], int]:
    """(records, rejected ones, number of both) of an InstructPix2Pix folder, or of one of its subfolders; `name`: the
    folder's part of the records' ids."""
    inside: dict[str, list[str]] = {}
    for file in files.list_files(folder, recursive=True):
        if not is_hidden(file):
            place, _, base = file.rpartition("/")
            inside.setdefault(place, []).append(base)
    records: list[dict[str, str]] = []
    rejected: list[Rejected] = []
    for place, bases in sorted(inside.items()):
        origin = f"{name}/{place}" if place else name
        sides: dict[str, dict[str, list[str]]] = {}
        for base in bases:
            if (match := _SIDE.fullmatch(base)) and is_picture(base):
                sides.setdefault(match[1], {}).setdefault(match[2], []).append(base)
        if _PROMPT in bases and not sides:
            why = "it has a prompt.json but no images SEED_0 and SEED_1"
            rejected.append(reject("edits", "", origin, UserError(why, "missing_image")))
        for seed, pair in sorted(sides.items()):
            where = f"{origin}/{seed}"
            if (error := _pair_error(bases, pair)) is not None:
                rejected.append(reject("edits", where, where, error))
            else:
                files_of = {"image": pair["0"][0], "target": pair["1"][0]}
                records.append({"folder": folder, "inside": place, "origin": where, **files_of})
    if not records and not rejected:
        raise UserError(f"folder '{folder}' has no prompt.json with images SEED_0.jpg, SEED_1.jpg", "empty_input")
    return records, rejected, len(records) + len(rejected)


def _pair_error(names: list[str], pair: dict[str, list[str]]) -> UserError | None:
    """Why the images of a seed, by side, are no triple; None if they are."""
    if _PROMPT not in names:
        return UserError("there is no prompt.json beside it", "missing_text")
    for side, when in (("0", "before"), ("1", "after")):
        if len(found := pair.get(side, [])) != 1:
            why = "is missing" if not found else f"is there more than once: {', '.join(found)}"
            return UserError(f"its image {when} the edit {why}", "missing_image" if not found else "several_images")
    return None


def _read_folder(folder: str, record: dict[str, str]) -> Triple:
    try:
        prompt = json.loads(files.read_text(urls.join(folder, _PROMPT)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, files.StoreError):
            raise
        raise UserError(f"its prompt.json cannot be read: {error}", "invalid_record") from None
    instruction = prompt.get("edit") if isinstance(prompt, dict) else None
    return record["image"], instruction, record["target"]
