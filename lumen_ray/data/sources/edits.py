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

from lumen_ray.data import files, urls
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
_SIDE = re.compile(r"(.+)_([01])\.(?:jpe?g|png|webp)", re.IGNORECASE)


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
        for location in (urls.absolute(path) for pattern in self.data for path in files.expand(pattern)):
            found, bad, number = self._records(location)
            records += found
            rejected += bad
            total += number
        most = max((r.get("records", 1) for r in records), default=1)
        return Listing(records, {"edits": total}, rejected=rejected, rows_per_record=most)

    def _records(self, location: str) -> tuple[list[Any], list[Rejected], int]:
        """(records, rejected ones, number of triples) of a folder or table."""
        if files.is_dir(location):
            return list_folder(location)
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
            folder = urls.join(record["folder"], record["inside"])
            yield self._outcome(record["origin"], lambda: _read_folder(folder, record), folder, named=False)
            return
        for origin, value in tables.read_chunk(record):
            yield self._outcome(origin, partial(self._cells, value), self.images, named=True)

    def _cells(self, value: Any) -> Triple:
        record = as_mapping(value)
        image, instruction, target = (tables.cell(record, wanted, usual) for wanted, usual in self._columns().values())
        return image, instruction, target

    def _outcome(self, origin: str, read: Callable[[], Triple], folder: str | None, named: bool) -> Outcome:
        try:
            return self._row(origin, *read(), folder, named)
        except UserError as error:
            return Outcome(rejected=[reject("edits", "", origin, error)])

    def _row(self, origin: str, image: Any, instruction: Any, target: Any, folder: str | None, named: bool) -> Outcome:
        text = clean_text(instruction, "the instruction")
        name, before, size = tables.load_image(image, folder)
        _, after, edited = tables.load_image(target, folder, "the edited image")
        check_sizes(size, edited, self.sizes)
        message = make_message("edit", text, None)
        identity = name if name is not None and named else origin  # file names repeat from folder to folder
        row = make_row(identity, before, size, self.kind, tasks=["edit"], messages=[message], target_image=after)
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


def list_folder(folder: str) -> tuple[list[dict[str, str]], list[Rejected], int]:
    """(records, rejected ones, number of both) of an InstructPix2Pix folder, or of one of its subfolders."""
    inside: dict[str, list[str]] = {}
    for name in files.list_files(folder, recursive=True):
        place, _, base = name.rpartition("/")
        inside.setdefault(place, []).append(base)
    records: list[dict[str, str]] = []
    rejected: list[Rejected] = []
    for place, names in sorted(inside.items()):
        origin = f"{urls.base_name(folder)}/{place}" if place else urls.base_name(folder)
        sides: dict[str, dict[str, str]] = {}
        for name in names:
            if match := _SIDE.fullmatch(name):
                sides.setdefault(match[1], {})[match[2]] = name
        if _PROMPT in names and not sides:
            rejected.append(reject("edits", "", origin, "it has a prompt.json but no images SEED_0 and SEED_1"))
        for seed, pair in sorted(sides.items()):
            where = f"{origin}/{seed}"
            if _PROMPT not in names:
                rejected.append(reject("edits", where, where, "there is no prompt.json beside it"))
            elif len(pair) < 2:
                missing = "before" if "1" in pair else "after"
                rejected.append(reject("edits", where, where, f"its image {missing} the edit is missing"))
            else:
                sides_of = {"image": pair["0"], "target": pair["1"]}
                records.append({"folder": folder, "inside": place, "origin": where, **sides_of})
    if not records and not rejected:
        raise UserError(f"folder '{folder}' has no prompt.json with images SEED_0.jpg, SEED_1.jpg", "empty_input")
    return records, rejected, len(records) + len(rejected)


def _read_folder(folder: str, record: dict[str, str]) -> Triple:
    try:
        prompt = json.loads(files.read_text(urls.join(folder, _PROMPT)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, files.StoreError):
            raise
        raise UserError(f"its prompt.json cannot be read: {error}", "invalid_record") from None
    instruction = prompt.get("edit") if isinstance(prompt, dict) else None
    return record["image"], instruction, record["target"]
