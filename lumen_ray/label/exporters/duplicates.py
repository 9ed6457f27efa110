"""Groups of images that are duplicates: with equal bytes, or that look alike by their perceptual hashes."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.errors import UserError
from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.near_duplicates import Groups, find_groups
from lumen_ray.tasks import Task

COLUMNS = ("group", "image_id", "path", "relation", "distance", "sha256", "phash")


class Duplicates(Exporter):
    """``duplicates.csv``: a row per image that is in a group with others, in input order; ``summary.json``: counts.

    `group`: counted from 1; `relation`: ``first`` of its group, ``exact`` if an earlier image has the same bytes, else
    ``near``; `distance`: bits in which its perceptual hash differs from that of the first, empty where one is missing.
    """

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        found = FoundDuplicates(labels, settings.near_distance)
        if not found.has_hashes:
            raise UserError(
                "these labels are from before hashes of images were recorded; label the images into a new folder, with "
                "--dedup for near duplicates",
                "no_hashes",
            )
        if not found.has_perceptual_hashes:
            labels.note = (
                "equal bytes only, as these labels have no perceptual hashes; label into a new folder with --dedup to "
                "find near duplicates"
            )
        first, is_member = found.groups.first, found.groups.is_member
        numbers = np.cumsum(is_member & (first == np.arange(len(first))))
        with (target / "duplicates.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for n, (image_id, path, sha256, phash) in enumerate(_images(labels)):
                if is_member[n]:
                    relation = "first" if first[n] == n else "exact" if found.groups.is_exact[n] else "near"
                    row = [numbers[first[n]], image_id, path, relation, found.distance_to_first(n), sha256, phash]
                    writer.writerow(row)
        labels.written = int(is_member.sum())
        (target / "summary.json").write_text(json.dumps(found.summary(), indent=1))


class FoundDuplicates:
    """The duplicates among the labelled images, numbered from 0 in input order. Memory: some 100 bytes an image.

    `has_hashes`: some images have a hash of any kind; `has_perceptual_hashes`: of how they look.
    """

    def __init__(self, labels: Labels, near_distance: int):
        self._near_distance = near_distance
        contents, hashes, known = array("Q"), array("Q"), array("B")
        for _, _, sha256, phash in _images(labels):
            contents.append(int(sha256[:16], 16) if sha256 else 0)
            hashes.append(int(phash, 16) if phash else 0)
            known.append((sha256 is not None) + 2 * (phash is not None))
        flags = np.frombuffer(known, np.uint8)
        self._contents, self._has_content = np.frombuffer(contents, np.uint64), (flags & 1) > 0
        self._hashes, self._has_hash = np.frombuffer(hashes, np.uint64), (flags & 2) > 0
        self.has_hashes, self.has_perceptual_hashes = bool(flags.any()), bool(self._has_hash.any())

    @cached_property
    def groups(self) -> Groups:
        """The groups of the images."""
        return find_groups(self._contents, self._has_content, self._hashes, self._has_hash, self._near_distance)

    def distance_to_first(self, image: int) -> int | None:
        """Bits in which the hashes of an image and of the first of its group differ."""
        first = self.groups.first[image]
        if not (self._has_hash[image] and self._has_hash[first]):
            return None
        return int(np.bitwise_count(self._hashes[image] ^ self._hashes[first]))

    def summary(self) -> dict[str, Any]:
        """``images``, ``without_phash`` (only exact duplicates of those are known), ``near_distance``, and the counts
        of `Groups`."""
        known = int(self._has_hash.sum())
        images = len(self._hashes)
        return {
            "images": images,
            "without_phash": images - known,
            "near_distance": self._near_distance,
            **self.groups.counts,
        }


def _images(labels: Labels) -> Iterator[tuple[str, str, str | None, str | None]]:
    """(id, path, sha256, phash) of each labelled image, in order."""
    for table in labels.ledger.tables(("image_id", "path", "sha256", "phash")):
        columns = (column.to_pylist() for column in table.columns)
        found: dict[tuple[str, str], tuple[str | None, str | None]] = {}
        for image_id, path, sha256, phash in zip(*columns, strict=True):
            found.setdefault((image_id, path), (sha256, phash))
        for key, hashes in found.items():
            yield *key, *hashes
