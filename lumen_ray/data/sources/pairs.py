"""Image-text pairs as a source: csv, tsv, jsonl and parquet tables, and WebDataset tars.

Read as a stream: a record of the listing is a tar, a chunk of lines or a row group. A pair becomes a row with its
caption, or with several where a list is given. In a tar, members with the same key are a pair: an image (.jpg, .jpeg,
.png, .webp, ...) and its caption, the .txt or the value of `caption_key` in the .json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, patterns, urls
from lumen_ray.data.pictures import SUFFIXES, distinct_names, unique_id
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources import tables, tars
from lumen_ray.data.sources.base import Listing, Outcome, Source, reject
from lumen_ray.data.sources.record_parsing import as_mapping, caption_texts, check_name
from lumen_ray.errors import UserError
from lumen_ray.tasks import get_task

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "title", "sentence", "caption_text", "captions")
IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
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
        chunks: list[tables.Chunk] = []
        archives: list[str] = []
        locations = [urls.absolute(path) for pattern in self.data for path in patterns.expand(pattern)]
        for location in dict.fromkeys(locations):
            if location.lower().endswith(tars.SUFFIXES):
                if not files.is_file(location):
                    raise UserError(f"tar '{location}' does not exist", "missing_annotations")
                archives.append(location)
                continue
            found = tables.chunks(location, self.header)
            if found:
                columns = tables.column_names(found[0])
                tables.pick_column(columns, self.image_column, IMAGE_COLUMNS, "image")
                tables.pick_column(columns, self.caption_column, CAPTION_COLUMNS, "caption")
            chunks += found
        tables.link_images(chunks, (self.image_column, IMAGE_COLUMNS))
        names = distinct_names(archives)
        records: list[Any] = [{"tar": location, "name": names[location]} for location in archives] + chunks
        most = max((r.get("records", _ROWS_PER_TAR) for r in records), default=1)
        return Listing(records, {"pairs": sum(chunk["records"] for chunk in chunks)}, rows_per_record=most)

    def rows(self, record: Any, shared: Any) -> Iterator[Outcome]:
        if "tar" in record:
            yield from self._tar_rows(record["tar"], record["name"])
            return
        for place, (origin, value) in enumerate(tables.read_chunk(record)):
            name: str | None = ""
            try:
                value = as_mapping(value)
                captions = caption_texts(tables.cell(value, self.caption_column, CAPTION_COLUMNS))
                image = tables.cell(value, self.image_column, IMAGE_COLUMNS)
                name, data, size = tables.load_image(image, self.images, chunk=record)
                yield _row(tables.image_id(record, place, origin, name), data, size, captions)
            except UserError as error:
                yield Outcome(rejected=[reject("pairs", name or "", origin, error)])

    def _tar_rows(self, location: str, tar: str) -> Iterator[Outcome]:
        times: Counter[str] = Counter()
        empty = True
        for key, members in tars.samples(location, (*IMAGE_EXTENSIONS, "txt", "json")):
            name = f"{tar}/{key}" if key else tar
            empty = False
            try:
                if isinstance(members, UserError):
                    raise members
                captions = self._captions(members, name in times)
                pictures = [members[extension] for extension in IMAGE_EXTENSIONS if members.get(extension) is not None]
                if len(pictures) > 1:
                    raise UserError(f"it has {len(pictures)} images ({', '.join(sorted(members))})", "several_images")
                if not pictures:
                    raise _incomplete("image", members, name in times)
                _, data, size = tables.load_image(pictures[0], None)
                outcome = _row(unique_id(check_name(name), times), data, size, captions)
            except UserError as error:
                outcome = Outcome(rejected=[reject("pairs", name, f"{tar} member {key}" if key else tar, error)])
                times[name] += 1
            outcome.came_in = {"pairs": 1}
            yield outcome
        if empty:
            why = UserError("the tar has no members, hidden ones aside", "empty_tar")
            yield Outcome(rejected=[reject("pairs", tar, tar, why)], came_in={"pairs": 1})

    def _captions(self, members: tars.Members, came_before: bool) -> list[str]:
        """The captions of a sample of a tar; `came_before`: whether the tar has had a sample of its key already."""
        text, meta = members.get("txt"), members.get("json")
        if text is not None and self.caption_key is None:
            return caption_texts(text.decode("utf-8", "surrogateescape"))
        if meta is None:
            raise _incomplete("caption", members, came_before)
        try:
            values = json.loads(meta.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"its json cannot be read: {error}", "invalid_record") from None
        key = self.caption_key or "caption"
        value = values.get(key) if isinstance(values, dict) else None
        if value is None:
            raise UserError(f"its json has no '{key}'", "missing_text")
        return caption_texts(value)


def _incomplete(what: str, members: tars.Members, came_before: bool) -> UserError:
    """The error of a sample of a tar without `what`."""
    extensions = sorted(members)
    if came_before:
        return UserError(
            f"it has no {what} ({', '.join(extensions)}), and members of its key came earlier: those of a sample must "
            "lie side by side",
            "scattered_tar",
        )
    dotted = next((e for e in extensions if "." in e), None)
    hint = f"; the key of a sample ends at the first dot, so '.{dotted}' is an extension" if dotted else ""
    return UserError(f"it has no {what} ({', '.join(extensions)}){hint}",
                     f"missing_{'image' if what == 'image' else 'text'}")  # fmt: skip


def _row(image_id: str, data: bytes, size: tuple[int, int], captions: list[str]) -> Outcome:
    # the prompt template follows from the text: all templates occur, and a pair always gets the same one
    messages = [make_message("caption", get_task("caption").prompt(template=len(text)), text) for text in captions]
    return Outcome(make_row(image_id, data, size, "pairs", tasks=["caption"], messages=messages))
