"""The labels of a finished folder as exporters read them: image by image, so that memory does not grow with the corpus.

A first pass over the label tables collects what the heads of files need: tasks, classes, prompts, and eight bytes per
image, of which file names are made unique.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lumen_ray.data import urls
from lumen_ray.errors import UserError
from lumen_ray.inference.records import record_edges
from lumen_ray.label.exporters.image_files import KINDS, Picture, open_picture
from lumen_ray.label.exporters.names import Names, file_stem, name_hash
from lumen_ray.label.inputs import Item, read_bytes
from lumen_ray.label.ledger import Ledger, open_finished
from lumen_ray.label.vocabulary import AUTO, classes_for
from lumen_ray.structures import Size
from lumen_ray.tasks import get_task

Record = dict[str, Any]  # a row of `LABEL_SCHEMA`

#: columns of the label table that may be null throughout: of an image, the same in all its rows, and of an instance
IMAGE_COLUMNS = ("sha256", "duplicate_of", "labelled_at")
INSTANCE_COLUMNS = ("presence", "verified", "agreement")


@dataclass
class Category:
    """A class or phrase of a task. `id`: counted from 1; `edges`: pairs of 0-based keypoint indices."""

    id: int
    name: str
    keypoints: list[str] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class LabelledImage:
    """One image and its rows.

    `number`: from 1, in input order, the same in every export; `path`: of the image file, or of the shard or tar that
    holds it; `name`: file name that is unique in the export, a stem without suffix where the export writes image files;
    `sha256`, `duplicate_of`, `labelled_at`: the columns of the label table.
    """

    number: int
    image_id: str
    path: str
    size: Size
    name: str
    records: dict[str, list[Record]] = field(default_factory=dict)
    sha256: str | None = None
    duplicate_of: str | None = None
    labelled_at: datetime | None = None

    def instances(self, task: str) -> list[Record]:
        """The rows with a box, best score first within a phrase; empty if the image has nothing of what was asked."""
        return [record for record in self.records.get(task, ()) if record["box"] is not None]

    def texts(self, task: str) -> list[Record]:
        """The rows with a text."""
        return [record for record in self.records.get(task, ()) if record["text"] is not None]


@dataclass
class Labels:
    """A finished folder, for the `tasks` chosen.

    `columns`: task -> those of `INSTANCE_COLUMNS` and `IMAGE_COLUMNS` with a value in any row, see `columns_of`;
    `categories`: task -> class name -> `Category`; `prompts`: text task -> its questions in order, "" for a task
    without; `num_images`: labelled images, without those that failed; `stems`: hashes of their names; `only`: numbers
    of the images that passes are limited to; `written`: set by an export that does not have all; `missing`: pictures
    that the last pass could not read; `note`: what the user should know of an export, set by it.
    """

    ledger: Ledger
    job: dict[str, Any]
    tasks: tuple[str, ...]
    columns: dict[str, set[str]]
    categories: dict[str, dict[str, Category]]
    prompts: dict[str, list[str]]
    num_images: int
    stems: np.ndarray
    progress: Callable[[int, int], None] | None = None
    only: frozenset[int] | None = None
    written: int | None = None
    missing: int = 0
    first_missing: str = ""
    note: str = ""

    @property
    def folder(self) -> Path | None:
        """The labelled folder; None for one in a bucket."""
        return None if urls.is_url(self.ledger.output) else Path(self.ledger.output)

    @cached_property
    def model_version(self) -> str:
        """The ``version`` in the provenance of the labels: that of the model, as servers and `Engine` name it."""
        table = next(table for table in self.ledger.tables(["provenance"]) if len(table))
        return str(json.loads(table["provenance"][0].as_py() or "{}").get("version", ""))

    def class_names(self) -> list[str]:
        """The classes of all chosen tasks, each once."""
        return list(dict.fromkeys(name for task in self.tasks for name in self.categories[task]))

    def boxed_tasks(self) -> list[str]:
        """The chosen tasks whose answers are instances."""
        return [task for task in self.tasks if not get_task(task).is_text]

    def text_tasks(self) -> list[str]:
        """The chosen tasks whose answers are texts."""
        return [task for task in self.tasks if get_task(task).is_text]

    def columns_of(self, *tasks: str) -> tuple[str, ...]:
        """Those of `INSTANCE_COLUMNS` and `IMAGE_COLUMNS` that have a value in any row of the tasks; exports leave the
        others out."""
        found = {name for task in tasks for name in self.columns.get(task, ())}
        return tuple(name for name in INSTANCE_COLUMNS + IMAGE_COLUMNS if name in found)

    def images(self, stems: bool = False) -> Iterator[LabelledImage]:
        """The labelled images in input order, named by their ids: paths that readers find the user's files by.

        stems: named as in `pictures`, for formats that write a file per image.
        """
        names = Names(self.stems) if stems else None
        for images in self._tables(lambda image_id: names.free(file_stem(image_id)) if names else image_id):
            yield from images

    def fragments(self) -> Iterator[tuple[tuple[Item, ...], list[LabelledImage], list[dict[str, str]]]]:
        """Per fragment of the job, in input order: its images, those of them that were labelled, and the errors of the
        others, rows of `ERROR_SCHEMA`; no errors where `only` limits the images."""
        done = self.ledger.done()
        finished = (fragment for fragment in self.ledger.plan().fragments() if fragment.index in done)
        for fragment, images in zip(finished, self._tables(lambda image_id: image_id), strict=True):
            entry = self.ledger.entry(fragment.index) if self.only is None else None
            yield fragment.items, images, entry["errors"] if entry else []

    def parts(self, size: int | None, stems: bool = False) -> Iterator[tuple[str, Iterator[LabelledImage]]]:
        """`images` in parts of at most `size`: (ending of the part's file name, its images), "" if one part holds all.

        A part's images must be used up before the next part is asked for.
        """
        yield from self._split(self.images(stems), lambda image: image.number, size)

    def pictures(self, kinds: Collection[str] = KINDS) -> Iterator[tuple[LabelledImage, Picture]]:
        """The labelled images with their encoded pictures, named by a stem without folders and dots.

        kinds: formats whose bytes are kept, see `open_picture`. Images that cannot be read any more, or have another
        size now, are left out and counted in `missing`. Raises `UserError` if that is all of them.
        """
        names = Names(self.stems)
        self.missing = 0
        items: _ItemFinder | None = None
        for images in self._tables(lambda image_id: names.free(file_stem(image_id))):
            stored = [image for image in images if not _is_local_file(image.path)]
            if stored and items is None:
                items = _ItemFinder(self.ledger)
            data = _stored_bytes(stored, items) if items else iter(())
            for image in images:
                source = Path(image.path) if _is_local_file(image.path) else next(data)
                try:
                    if isinstance(source, UserError):
                        raise source
                    picture = open_picture(image.image_id, source, image.size, image.sha256, kinds)
                except UserError:
                    self.missing += 1
                    self.first_missing = self.first_missing or image.path
                else:
                    yield image, picture
        if self.missing == self.num_images:
            raise UserError(
                f"none of the {self.num_images} images can be read, the first is '{self.first_missing}'; run the "
                "command in the folder where they were labelled, or choose a format without image files",
                "missing_images",
            )

    def picture_parts(
        self, size: int | None, kinds: Collection[str] = KINDS
    ) -> Iterator[tuple[str, Iterator[tuple[LabelledImage, Picture]]]]:
        """`pictures` in parts, as in `parts`."""
        yield from self._split(self.pictures(kinds), lambda pair: pair[0].number, size)

    def _split(self, items: Iterator[Any], number: Callable[[Any], int], size: int | None) -> Iterator[Any]:
        if size is None or size >= self.num_images:
            yield "", items
            return
        for index, part in groupby(items, key=lambda item: (number(item) - 1) // size):
            yield f"-{index + 1:05d}", part

    def _tables(self, name: Callable[[str], str]) -> Iterator[list[LabelledImage]]:
        """The images of each label table."""
        done = 0
        for table in self.ledger.tables():
            found: dict[tuple[str, str], LabelledImage] = {}
            for record in table.to_pylist():
                key = record["image_id"], record["path"]
                if (image := found.get(key)) is None:
                    size = (record["height"], record["width"])
                    own = {column: record[column] for column in IMAGE_COLUMNS}
                    image = LabelledImage(done + len(found) + 1, *key, size, name(record["image_id"]), **own)
                    found[key] = image
                if record["task"] in self.tasks:
                    image.records.setdefault(record["task"], []).append(record)
            yield [image for image in found.values() if self.only is None or image.number in self.only]
            done += len(found)
            if self.progress is not None:
                self.progress(done, self.num_images)


def open_labels(labelled: str | Path) -> Labels:
    """Scans a labelled folder, with all its tasks chosen. Raises `UserError` if it is not one or holds no labels."""
    ledger = open_finished(labelled)
    job = ledger.settings() or {}
    categories: dict[str, dict[str, Category]] = {}
    prompts: dict[str, dict[str, None]] = {}
    stems = array("Q")
    columns: dict[str, set[str]] = {}
    for table in ledger.tables():
        for name in INSTANCE_COLUMNS + IMAGE_COLUMNS:
            for task in table["task"].filter(table[name].is_valid()).unique().to_pylist():
                columns.setdefault(task, set()).add(name)
        _scan(table, categories, prompts, job)
        image_ids = table["image_id"].to_pylist()
        for image_id, _ in dict.fromkeys(zip(image_ids, table["path"].to_pylist(), strict=True)):
            stems.append(name_hash(file_stem(image_id)))
    if not stems:
        raise UserError(f"'{labelled}' holds no labels yet; run `lumen-ray label` to its end first", "no_labels")
    tasks = sorted(
        categories, key=lambda task: job["tasks"].index(task) if task in job.get("tasks", ()) else len(stems)
    )
    texts = {task: list(found) for task, found in prompts.items()}
    return Labels(ledger, job, tuple(tasks), columns, categories, texts, len(stems), np.frombuffer(stems, np.uint64))


def _scan(
    table: pa.Table,
    categories: dict[str, dict[str, Category]],
    prompts: dict[str, dict[str, None]],
    job: dict[str, Any],
) -> None:
    """Adds the tasks, classes, skeletons and prompts of one label table."""
    columns = (table[name].to_pylist() for name in ("task", "phrase", "prompt"))
    for row, (task, phrase, prompt) in enumerate(zip(*columns, strict=True)):
        if task not in categories:
            listed = job.get("classes", ())
            # classes from captions are known by their instances
            names = listed if get_task(task).needs == "classes" and listed != AUTO else ()
            skeletons = json.loads(table["provenance"][row].as_py() or "{}").get("skeletons")
            names = classes_for(task, job.get("keypoints"), names, skeletons)
            categories[task] = {name: Category(k, name) for k, name in enumerate(dict.fromkeys(names), start=1)}
        found = categories[task]
        if get_task(task).is_text:
            prompts.setdefault(task, {}).setdefault(prompt or "")
        elif phrase is not None:
            category = found.setdefault(phrase, Category(len(found) + 1, phrase))
            if get_task(task).result == "keypoints" and not category.keypoints:
                _add_skeleton(category, table.slice(row, 1).to_pylist()[0])


def _add_skeleton(category: Category, record: Record) -> None:
    if record["keypoints"] is not None:
        category.keypoints = list(record["keypoint_names"])
        category.edges = [(int(a), int(b)) for a, b in record_edges(record)]


def _is_local_file(path: str) -> bool:
    """Whether `path` is that of an image file on this machine, not in a shard, a tar or a store."""
    return not urls.is_url(path) and not path.lower().endswith((".parquet", ".tar"))


class _ItemFinder:
    """Where the images of a job are in their shards and tars. `find` is asked in input order.

    Memory: the failed images.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._items = iter(ledger.items())
        self._passed: dict[tuple[str, str], Item] = {}

    def find(self, image: LabelledImage) -> Item | None:
        key = image.image_id, image.path
        if key in self._passed:
            return self._passed.pop(key)
        for item in self._items:
            if (item.image_id, urls.shown(item.path)) == key:
                return item
            self._passed[item.image_id, urls.shown(item.path)] = item
        return None


def _stored_bytes(images: Sequence[LabelledImage], items: _ItemFinder) -> Iterator[bytes | UserError]:
    """The bytes of images in shards, tars or stores, or the error of reading them."""
    found = [items.find(image) for image in images]
    data = read_bytes([item for item in found if item is not None])
    for image, item in zip(images, found, strict=True):
        gone = UserError(f"the job's list of images has no '{image.image_id}'", "missing_image")
        yield gone if item is None else next(data)[1]
