"""Images whose encoded bytes have been labelled before get copies of those labels instead of a look of the model.

An original is found among the images that the worker has in hand, else in the index of the job (`content_index.py`),
which names the fragment whose published labels are then read. Two workers that meet the same bytes at the same moment
both label them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Protocol, Self

import pyarrow.compute as pc

from lumen_ray.data import urls
from lumen_ray.errors import UserError
from lumen_ray.label.content_index import Index, content_keys
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger

#: label tables of fragments that a worker keeps, as the images after a duplicate are often duplicates of those after it
_TABLES = 16


class Copyable(Protocol):
    """An image on its way: `sha256` of its bytes, hexadecimal; `records`: its label rows, empty before it is labelled
    and if that failed; `twin`: an image with the same bytes that is being labelled."""

    item: Item
    sha256: str
    records: list[dict[str, Any]]
    twin: Self | None


class Duplicates:
    """Finds the duplicates among the images of one worker, which publishes the fragments in the order it reads them.

    `look_up` may be called in another thread than the rest.
    """

    def __init__(self, ledger: Ledger, index: Index):
        self._index = index
        self._table = lru_cache(_TABLES)(ledger.table)
        self._in_hand: dict[str, Any] = {}  # sha256 -> the first image with it that is not published yet

    def look_up(self, images: Sequence[Copyable]) -> None:
        """Fills in the records of images whose bytes have been labelled, and the twin of those that are about to be."""
        for image in images:
            image.twin = self._in_hand.get(image.sha256)
        # In this order: an image that is no longer in hand has been added to the index.
        asked = [image for image in images if image.twin is None]
        found = self._index.find(content_keys([image.sha256 for image in asked]))
        for image, fragment in zip(asked, found.tolist(), strict=True):
            image.records = _copies(self._originals(fragment, image.sha256), image.item) if fragment >= 0 else []
            if not image.records:
                first = self._in_hand.setdefault(image.sha256, image)
                image.twin = None if first is image else first

    def copy(self, images: Sequence[Copyable]) -> list[int]:
        """Fills in the records of images with a twin; returns the numbers of those whose twin could not be labelled."""
        failed = []
        for number, image in enumerate(images):
            if image.twin is not None:
                image.records = _copies(image.twin.records, image.item)
                image.twin = None
                if not image.records:
                    failed.append(number)
        return failed

    def published(self, fragment: int, images: Sequence[Copyable]) -> None:
        """Passes the images of a published fragment that were not copied to the index."""
        own = [image.sha256 for image in images if image.records and image.records[0]["duplicate_of"] is None]
        self._index.add(content_keys(own), fragment)
        for image in images:
            if self._in_hand.get(image.sha256) is image:
                del self._in_hand[image.sha256]

    def _originals(self, fragment: int, sha256: str) -> list[dict[str, Any]]:
        """The rows of the image in a published fragment that has this content, empty if there is none."""
        try:
            table = self._table(fragment)
        except UserError:  # unreadable: the image is labelled again
            return []
        rows = table.filter(pc.equal(table["sha256"], sha256)).to_pylist()
        own = [row for row in rows if row["duplicate_of"] is None]
        return [row for row in own if row["image_id"] == own[0]["image_id"]]


def _copies(records: Sequence[dict[str, Any]], item: Item) -> list[dict[str, Any]]:
    """The label rows of another image, as those of `item`."""
    mine = {"image_id": item.image_id, "path": urls.shown(item.path), "labelled_at": datetime.now(UTC)}
    return [record | mine | {"duplicate_of": record["image_id"]} for record in records]
