"""What the driver of `lumen-ray label` takes, and how soon it starts, against the number of images.

The images are hard links to one small picture and the engine answers nothing, so that listing, plan, ledger and driver
are all there is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumen_ray.bench.json_worker import answer_once
from lumen_ray.bench.timing import Result
from lumen_ray.data.scenes.render import encode_jpeg

NUMBERS = (1_000, 100_000, 1_000_000)
PER_FOLDER = 10_000
WORKER = Path(__file__).with_name("label_scale_worker.py")
#: name of the result -> (key of the worker's answer, unit)
MEASURED = {
    "driver's peak memory": ("peak_mib", "MiB"),
    "driver's CPU time": ("driver_ms_per_image", "ms an image"),
    "first images answered": ("first_s", "s after the model was up"),
    "whole job": ("seconds", "s"),
    "run again when finished": ("again_s", "s"),
}


def bench(folder: Path, numbers: Sequence[int] = NUMBERS) -> Iterator[Result]:
    """Jobs of so many images, each in a process of its own on a Ray of its own, one after the other."""
    source = folder / "images"
    found: dict[int, dict[str, Any]] = {}
    written = 0
    for number in sorted(numbers):
        write_links(source, written, number)
        written = number
        found[number] = _job(folder, source, number)
    for name, (key, unit) in MEASURED.items():
        rates = {f"{number:,} images": [one[key]] for number, one in found.items()}
        yield Result(f"scale/{name}", unit, rates, budget=f"{os.cpu_count()} cores", details={"jobs": found})


def write_links(folder: Path, start: int, end: int) -> None:
    """Hard links `start` to `end` to one picture, `PER_FOLDER` in each folder; fewer to a file than a disk allows."""
    picture = encode_jpeg(np.full((32, 32, 3), 90, np.uint8))
    for number in range(start, end):
        place = folder / f"{number // PER_FOLDER:05d}" / f"{number % PER_FOLDER:05d}.jpg"
        if number % PER_FOLDER == 0:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(picture)
            continue
        os.link(place.with_name("00000.jpg"), place)


def _job(folder: Path, source: Path, number: int) -> dict[str, Any]:
    command = [sys.executable, "-P", str(WORKER), str(source), str(folder / f"labels-{number}"), str(number)]
    return answer_once(f"a job of {number} images", command, os.environ, folder)


def empty_engine(started: Path) -> Callable[[], Any]:
    """A function that makes an engine which finds nothing, and notes in `started` when it was up."""

    def make() -> Any:
        import time

        from lumen_ray.bench.label_scale import EmptyEngine

        started.write_text(repr(time.time()))
        return EmptyEngine()

    return make


class EmptyEngine:
    """An engine that finds nothing in any image."""

    preset, version, image_size, largest_side, dtype = "empty", "0", 32, 32, "float32"
    tasks, serving, chosen_decoders = ("detect",), {"detect": "empty"}, {}  # type: ignore[var-annotated]
    classes, skeletons, edges = ("nothing",), {}, {}  # type: ignore[var-annotated]

    def input_size(self, shown: Any) -> tuple[int, int]:
        return self.image_size, self.image_size

    def run(self, images: Sequence[Any], requests: Sequence[Sequence[Any]], **options: Any) -> list[list[Any]]:
        from lumen_ray.answer import Answer
        from lumen_ray.data.images import as_picture

        return [
            [Answer(request.task, as_picture(image).size, []) for request in row]
            for image, row in zip(images, requests, strict=True)
        ]
