"""Edit triples (image, instruction, edited image) as a source: InstructPix2Pix's folders, and tables.

A folder holds subfolders with a ``prompt.json`` (its `edit` is the instruction) and images ``<seed>_0.jpg`` and
``<seed>_1.jpg``, before and after. A table (csv, tsv, jsonl, parquet) has a column for each of the three.
A triple becomes a row of task `edit`: `image`, `target_image`, and the instruction as a message of one user turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
#: how the two images' sizes must agree: the same pixels, the same shape (within 2 percent), or not at all
SIZES = ("same", "aspect", "any")
_ASPECT_TOLERANCE = 0.02
_PROMPT = "prompt.json"
_SIDE = re.compile(r"(.+)_([01])\.(?:jpe?g|png|webp)", re.IGNORECASE)


@dataclass
class EditsSource(Source):
    """`data`: folders and tables; `images`: folder of the images where tables hold paths; `sizes`: one of `SIZES`; the
    columns are by default the first of the usual names."""

    data: list[str]
    images: str | None = None
    image_column: str | None = None
    instruction_column: str | None = None
    target_column: str | None = None
    sizes: str = "aspect"
    kind = "edits"
    row_kind = "edits"

    def list(self) -> Listing:
        check_choice("sizes", self.sizes, SIZES)
        if self.images is not None:
            self.images = urls.absolute(self.images)
            if not files.is_dir(self.images):
                raise UserError(f"image folder '{self.images}' does not exist", "missing_images")
        listing = Listing([], {"edits": 0})
        for location in (urls.absolute(path) for pattern in self.data for path in files.expand(pattern)):
            records, rejected, number = self._listed(location)
            listing.records += records
            listing.rejected += rejected
            listing.inputs["edits"] += number
        listing.rows_per_record = max((r.get("records", 1) for r in listing.records), default=1)
        return listing

    def _listed(self, location: str) -> tuple[list[Any], list[Rejected], int]:
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
            triples = [(record["origin"], lambda: _read_folder(folder, record))]
        else:
            triples = ((origin, lambda value=value: self._cells(value)) for origin, value in tables.read_chunk(record))
            folder = self.images
        for origin, read in triples:
            try:
                yield self._row(origin, *read(), folder, named="folder" not in record)
            except UserError as error:
                yield Outcome(rejected=[reject("edits", "", origin, error)])

    def _cells(self, value: Any) -> tuple[Any, Any, Any]:
        record = as_mapping(value)
        return tuple(tables.cell(record, wanted, usual) for wanted, usual in self._columns().values())

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
    """`UserError` (`size_mismatch`) for (height, width) of the two images that do not agree as `rule` wants."""
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
    """(records, rejected ones, their number) of an InstructPix2Pix folder, or of one of its subfolders."""
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
            rejected.append(reject("edits", "", origin, "it has a prompt.json but no images named SEED_0 and SEED_1"))
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
        raise UserError(f"folder '{folder}' holds no prompt.json with images SEED_0.jpg, SEED_1.jpg", "empty_input")
    return records, rejected, len(records) + len(rejected)


def _read_folder(folder: str, record: dict[str, str]) -> tuple[Any, Any, Any]:
    try:
        prompt = json.loads(files.read_text(urls.join(folder, _PROMPT)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, files.StoreError):
            raise
        raise UserError(f"its prompt.json cannot be read: {error}", "invalid_record") from None
    instruction = prompt.get("edit") if isinstance(prompt, dict) else None
    return record["image"], instruction, record["target"]
