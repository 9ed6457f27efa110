"""Writes a gallery from the labels of a folder, image by image."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.windows import LargeImage
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.labels import LabelledImage, Labels
from lumen_ray.label.gallery.cards import failed_card, labelled_card, write_thumbnail
from lumen_ray.label.gallery.layout import GalleryFiles, index_entry
from lumen_ray.label.inputs import Item, Reader
from lumen_ray.label.reading import find_large_file
from lumen_ray.tasks import get_task
from lumen_ray.viz import KEYPOINT_SCORE, palette


@dataclass(frozen=True)
class _Image:
    """An image of the gallery: labelled, or failed with a row of `ERROR_SCHEMA`."""

    item: Item
    labelled: LabelledImage | None
    error: dict[str, str] | None


def write_gallery(labels: Labels, target: Path, *, most: int | None = None, order: Sequence[int] | None = None) -> None:
    """Writes the folder of a gallery of the first `most` images of the input (None: all), failed ones included.

    `target`: a new, empty folder. `order`: numbers of the images in the order in which the page shows them first,
    where ``labels.only`` limits it to these. Sets ``labels.missing`` and ``labels.written``: an image that cannot be
    read any more, or has another size now, is shown without its picture, with the reason.
    """
    classes = sorted(labels.class_names())
    writer = _Writer(labels, GalleryFiles(target), {name: number for number, name in enumerate(classes)})
    places: dict[int, int] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for place, image in enumerate(writer.add_all(pool, _images(labels, most))):
            if order is not None and image.labelled is not None:
                places[image.labelled.number] = place
    writer.files.close(_meta(labels, writer, classes, [places[number] for number in order or () if number in places]))
    labels.missing, labels.written = writer.missing, writer.written


def _images(labels: Labels, most: int | None) -> Iterator[_Image]:
    number = 0
    for items, images, errors in labels.fragments():
        labelled = {(image.image_id, image.path): image for image in images}
        failed = {(error["image_id"], error["path"]): error for error in errors}
        for item in items:
            key = item.image_id, urls.shown(item.path)
            if key in labelled or key in failed:
                if number == most:
                    return
                number += 1
                yield _Image(item, labelled.get(key), failed.get(key))


class _Writer:
    """`counts`: instances by (task, class), as numbers; `written`, `missing`: labelled images with and without a
    picture."""

    def __init__(self, labels: Labels, files: GalleryFiles, classes: dict[str, int]) -> None:
        self.files, self.written, self.missing = files, 0, 0
        self.counts: Counter[tuple[int, int]] = Counter()
        self._tasks, self._classes = labels.tasks, classes
        self._reader = Reader()

    def add_all(self, pool: ThreadPoolExecutor, images: Iterable[_Image]) -> Iterator[_Image]:
        """Adds the images and yields each once it is added. Threads decode them; a few per core are in memory."""
        waiting: deque[tuple[_Image, Future[dict[str, Any]]]] = deque()
        for number, image in enumerate(images):
            source = self._source(image.item) if image.labelled else b""
            waiting.append((image, pool.submit(self._card, image, source, self.files.thumbnail(number))))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield self._add(*waiting.popleft())
        while waiting:
            yield self._add(*waiting.popleft())

    def _source(self, item: Item) -> bytes | LargeImage | UserError:
        """The encoded bytes of an image, or a file that is read by window; or the error of reading it."""
        try:
            return find_large_file(item) or self._reader.read(item)
        except UserError as error:
            return error

    def _add(self, image: _Image, waiting: Future[dict[str, Any]]) -> _Image:
        card = waiting.result()
        failed = "e" in card
        if image.labelled is not None:
            self.missing += failed
            self.written += not failed
        self.files.add(card, b"\x01" if failed or image.labelled is None else self._index(image.labelled))
        return image

    def _card(self, image: _Image, source: bytes | LargeImage | UserError, thumbnail: Path) -> dict[str, Any]:
        shown, path = image.labelled, urls.shown(image.item.path)
        if shown is None:
            assert image.error is not None, "an image is labelled or failed"
            return failed_card(image.item.image_id, path, image.error["reason"], image.error["message"])
        try:
            if isinstance(source, UserError):
                raise source
            return labelled_card(shown, write_thumbnail(source, shown.size, thumbnail), self._tasks, self._classes)
        except UserError as error:
            return failed_card(shown.image_id, path, error.reason, f"It was labelled, but {error}")

    def _index(self, image: LabelledImage) -> bytes:
        number = len(self._tasks)
        groups: dict[int, list[float]] = {}
        texts = []
        for task, name in enumerate(self._tasks):
            if get_task(name).is_text:
                texts.append((task, len(image.texts(name))))
            for record in image.instances(name):
                phrase = self._classes[record["phrase"]]
                self.counts[task, phrase] += 1
                groups.setdefault((phrase + 1) * number + task, []).append(record["score"])
        return index_entry(groups.items(), [(task, texts_) for task, texts_ in texts if texts_], failed=False)


def _meta(labels: Labels, writer: _Writer, classes: list[str], order: list[int]) -> dict[str, Any]:
    """What the page has to know before the first image."""
    colours = palette(classes)
    totals = labels.ledger.totals()
    threshold = labels.job.get("score_threshold", 0)
    facts = {
        "images": f"{totals['images']:,}",
        "labelled": f"{totals['labelled']:,}",
        "errors": f"{totals['errors']:,}",
        "score from": threshold,
        "tasks": ", ".join(labels.tasks),
    }
    if order:
        facts["shown here"] = f"the chosen {writer.files.images:,}"
    elif writer.files.images < totals["images"]:
        facts["shown here"] = f"the first {writer.files.images:,}"
    numbers = {name: number for number, name in enumerate(classes)}
    edges: dict[int, dict[int, Any]] = {}
    for task, name in enumerate(labels.tasks):
        for phrase, category in labels.categories[name].items():
            if category.edges:
                edges.setdefault(task, {})[numbers[phrase]] = category.edges
    return {
        "facts": facts,
        "tasks": [{"name": name, "isText": get_task(name).is_text} for name in labels.tasks],
        "classes": [[name, "#{:02x}{:02x}{:02x}".format(*colours[name])] for name in classes],
        "counts": [[task, phrase, count] for (task, phrase), count in writer.counts.items()],
        "edges": edges,
        "scoreFrom": int(100 * threshold),
        "keypointScore": round(1000 * KEYPOINT_SCORE),
        "order": order,
    }
