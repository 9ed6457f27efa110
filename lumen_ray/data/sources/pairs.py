"""Image-text pairs as a source: csv, tsv, jsonl and parquet tables, and WebDataset tars.

Read as a stream: a record of the listing is a tar, a chunk of lines or a row group. A pair becomes a row with one
caption. In a tar, members with the same stem are a pair: an image (.jpg, .jpeg, .png, .webp, ...) and its caption, the
.txt or the value of `caption_key` in the .json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources import tables, tars
from lumen_ray.data.sources.base import Listing, Outcome, Source, reject
from lumen_ray.data.sources.record_parsing import as_mapping, check_name, clean_text, first_of
from lumen_ray.errors import UserError
from lumen_ray.tasks import get_task

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "title", "sentence", "caption_text", "captions")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_ROWS_PER_TAR = 2000  # estimate, before a tar is read


@dataclass
class PairsSource(Source):
    """`data`: tables and tars, wildcards ``*`` and ``?`` expanded; `images`: folder of the images if tables hold paths;
    `image_column`, `caption_column`: of tables, by default the first with a usual name; `caption_key`: of the json in
    tars; `header`: whether the first line of a csv or tsv file names the columns (else they are 0, 1, ...)."""

    data: list[str]
    images: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    caption_key: str | None = None
    header: bool = True
    kind = "pairs"
    row_kind = "pairs"

    def read_listing(self) -> Listing:
        if self.images is not None:
            self.images = urls.absolute(self.images)
            if not files.is_dir(self.images):
                raise UserError(f"image folder '{self.images}' does not exist", "missing_images")
        records: list[Any] = []
        number = 0
        for location in (urls.absolute(path) for pattern in self.data for path in files.expand(pattern)):
            if location.lower().endswith(tars.SUFFIXES):
                if not files.is_file(location):
                    raise UserError(f"tar '{location}' does not exist", "missing_annotations")
                records.append({"tar": location})
                continue
            chunks = tables.chunks(location, self.header)
            if chunks:
                columns = tables.column_names(chunks[0])
                tables.pick_column(columns, self.image_column, IMAGE_COLUMNS, "image")
                tables.pick_column(columns, self.caption_column, CAPTION_COLUMNS, "caption")
            records += chunks
            number += sum(chunk["records"] for chunk in chunks)
        most = max((r.get("records", _ROWS_PER_TAR) for r in records), default=1)
        return Listing(records, {"pairs": number}, rows_per_record=most)

    def rows(self, record: Any, shared: Any) -> Iterator[Outcome]:
        if "tar" in record:
            yield from self._tar_rows(record["tar"])
            return
        for origin, value in tables.read_chunk(record):
            name: str | None = ""
            try:
                value = as_mapping(value)
                caption = clean_text(tables.cell(value, self.caption_column, CAPTION_COLUMNS), "the caption")
                image = tables.cell(value, self.image_column, IMAGE_COLUMNS)
                name, data, size = tables.load_image(image, self.images)
                yield _row(name or origin, data, size, caption)
            except UserError as error:
                yield Outcome(rejected=[reject("pairs", name or "", origin, error)])

    def _tar_rows(self, location: str) -> Iterator[Outcome]:
        tar = urls.base_name(location)
        for key, members in tars.samples(location, (*IMAGE_EXTENSIONS, "txt", "json")):
            name = f"{tar}/{key}" if key else tar
            try:
                if isinstance(members, UserError):
                    raise members
                caption = clean_text(self._caption(members), "the caption")
                image = first_of(members, IMAGE_EXTENSIONS)
                if image is None:
                    raise UserError(f"it has no image ({', '.join(sorted(members))})", "missing_image")
                _, data, size = tables.load_image(image, None)
                outcome = _row(check_name(name), data, size, caption)
            except UserError as error:
                outcome = Outcome(rejected=[reject("pairs", name, tar, error)])
            outcome.came_in = {"pairs": 1}
            yield outcome

    def _caption(self, members: tars.Members) -> Any:
        """The caption of a sample of a tar, not yet checked to be a text."""
        text, meta = members.get("txt"), members.get("json")
        if text is not None and self.caption_key is None:
            return text.decode("utf-8", "surrogateescape")
        if meta is None:
            raise UserError(f"it has no caption ({', '.join(sorted(members))})", "missing_text")
        try:
            values = json.loads(meta)
        except (ValueError, RecursionError) as error:
            raise UserError(f"its json cannot be read: {error}", "invalid_record") from None
        key = self.caption_key or "caption"
        value = values.get(key) if isinstance(values, dict) else None
        if value is None:
            raise UserError(f"its json has no '{key}'", "missing_text")
        return value


def _row(image_id: str, data: bytes, size: tuple[int, int], caption: str) -> Outcome:
    # the prompt template follows from the text: all templates occur, and a pair always gets the same one
    message = make_message("caption", get_task("caption").prompt(template=len(caption)), caption)
    return Outcome(make_row(image_id, data, size, "pairs", tasks=["caption"], messages=[message]))
