"""WebDataset tars: per sample an image and a JSON, in tars of 1000 samples.

Keys have no dots, at the first of which a reader ends them, and the members of a sample lie together. The JSON is an
object, since Ray's reader unwraps lists of one element at its top. The bytes of JPEG and PNG files are kept, others
become PNG. Ray and `datasets` want the same members in every sample, so all images have the extension of the first, in
a corpus of both kinds too: readers decode by content.

`datasets` takes the types of the JSON from the first samples alone and fails on a list that was empty in all of these,
so samples that together fill every list come first.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.image_files import Picture
from lumen_ray.label.exporters.labels import LabelledImage, Labels
from lumen_ray.label.exporters.sample_json import sample
from lumen_ray.tasks import Task

SAMPLES_PER_TAR = 1000
#: samples from which `datasets` takes the types
TYPED_BY = 5
_KEPT = ("JPEG", "MPO", "PNG")  # Pillow's names of formats


class WebDataset(Exporter):
    """``labels-00001.tar``, ...; all tasks in the JSON of a sample."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        size = settings.max_images_per_file or SAMPLES_PER_TAR
        first, untyped = _first_samples(labels)
        if untyped:
            labels.note = (
                f"datasets takes the types of lists from {TYPED_BY} samples, and no {TYPED_BY} fill those of "
                f"{', '.join(untyped)}: give it features="
            )
        extension = ""
        for number, pairs in groupby(enumerate(_ordered(labels, first)), key=lambda item: item[0] // size):
            with tarfile.open(target / f"labels-{number + 1:05d}.tar", "w") as tar:
                for _, (image, picture) in pairs:
                    extension = extension or (".png" if picture.suffix == ".png" else ".jpg")
                    _add(tar, f"{image.name}{extension}", picture.read())
                    _add(tar, f"{image.name}.json", json.dumps(sample(image, labels)).encode())


def _ordered(labels: Labels, first: list[int]) -> Iterator[tuple[LabelledImage, Picture]]:
    """The pictures of the images numbered in `first`, then the others, in input order."""
    chosen = replace(labels, only=frozenset(first), progress=None)
    return chain(chosen.pictures(_KEPT), (pair for pair in labels.pictures(_KEPT) if pair[0].number not in first))


def _first_samples(labels: Labels) -> tuple[list[int], list[str]]:
    """Numbers of at most `TYPED_BY` images whose samples together have a value in every list that has one in any
    sample, and the lists for which that cannot be had."""
    numbers: dict[frozenset[str], int] = {}  # of the first image for each choice of lists that are empty
    for image in labels.images():
        if numbers.setdefault(_empty_lists(sample(image, labels)), image.number) == image.number:
            chosen = _cover(list(numbers))
            if not frozenset.intersection(*chosen):
                return [numbers[empty] for empty in chosen], []
    left = frozenset.intersection(*chosen) - frozenset.intersection(*numbers)
    return [numbers[empty] for empty in chosen], sorted(left)


def _cover(found: list[frozenset[str]]) -> list[frozenset[str]]:
    """Those of `found`, at most `TYPED_BY`, that are chosen one by one for the fewest elements in common."""
    chosen: list[frozenset[str]] = []
    common = frozenset.union(*found, {""})  # one more than any has
    while len(chosen) < TYPED_BY:
        best = min(found, key=lambda empty: len(common & empty))
        if common <= best:
            break
        chosen.append(best)
        common &= best
    return chosen


def _empty_lists(value: Any, place: str = "") -> frozenset[str]:
    """The lists and values of a JSON object that leave their type open: empty, null, or of such alone."""
    if isinstance(value, dict):
        parts = (_empty_lists(inner, f"{place}.{key}" if place else key) for key, inner in value.items())
        return frozenset().union(*parts)
    if isinstance(value, list) and value:
        return frozenset.intersection(*(_empty_lists(inner, place) for inner in value))
    return frozenset({place} if value is None or value == [] else ())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
