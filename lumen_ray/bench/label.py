"""The speed of `lumen-ray label`: a worker against a bare loop of the same engine, the command against another
checkout's."""

from __future__ import annotations

import io
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lumen_ray.bench.json_worker import answer_once
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.data.images import decode, decode_reduced
from lumen_ray.data.scenes.render import encode_jpeg, render
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import Request
from lumen_ray.label.inputs import Item
from lumen_ray.label.plan import Fragment
from lumen_ray.label.requests import build_requests
from lumen_ray.label.workers import Labeller, WorkerSettings
from lumen_ray.presets import DEFAULT_MODEL

IMAGES, LARGE_IMAGES = 128, 32
FRAGMENT = 32
THRESHOLD = 0.3
LARGE_SIZE = (6000, 4000)  # (width, height) of 24 megapixels
MANY_TASKS = ("detect", "segment", "pose", "caption", "vqa")
QUESTION = "how many circles are there ?"
THIS, OTHER = "this", "other checkout"
WORKER = Path(__file__).with_name("label_worker.py")


def bench(
    folder: Path,
    *,
    model: str = DEFAULT_MODEL,
    threads: int = 1,
    turns: int = 3,
    images: int = IMAGES,
    large: int = LARGE_IMAGES,
) -> Iterator[Result]:
    """A worker from image files to committed Parquet, by CPU time of its process: against a bare loop over decoded
    pixels, with photographs of 24 megapixels against a bare loop that decodes them at reduced scale, and with several
    tasks against detection alone."""
    torch.set_num_threads(threads)
    labeller = _Worker(folder / "labels", model, threads)
    scenes = write_scenes(folder / "scenes", images)
    photos = write_photographs(folder / "photographs", large)
    detect = labeller.requests("detect")

    def bare() -> float:
        return len(scenes) / _cpu_seconds(lambda: _run(labeller.engine, pixels, detect))

    pixels = [decode(path.read_bytes()) for path in scenes]
    equal = labeller.check_equal(scenes, pixels, detect)  # warms both sides up
    sides = {"worker": lambda: labeller.rate(scenes, detect), "bare loop": bare}
    yield Result(
        "files to Parquet",
        "images/s of CPU time",
        in_turns(sides, turns),
        aim=0.95,
        equal=equal,
        budget=f"{threads} threads",
        note="the bare loop has its images decoded in memory and keeps its answers there",
        details={"images": images, "model": model},
    )

    def bare_large() -> float:
        side = labeller.engine.largest_side
        return len(photos) / _cpu_seconds(
            lambda: _run(labeller.engine, [decode_reduced(p.read_bytes(), side) for p in photos], detect)
        )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rates = in_turns({"worker": lambda: labeller.rate(photos, detect), "bare loop": bare_large}, turns)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    yield Result(
        "24-megapixel photographs",
        "images/s of CPU time",
        rates,
        aim=0.8,
        budget=f"{threads} threads",
        note="the bare loop decodes at the scale that the engine reads",
        details={"images": large, "model": model, "peak_memory_grown": grown * 1024},
    )
    many = labeller.requests(*MANY_TASKS)
    yield Result(
        f"{', '.join(MANY_TASKS)} against detect",
        "images/s of CPU time",
        in_turns(
            {"five tasks": lambda: labeller.rate(scenes, many), "detect": lambda: labeller.rate(scenes, detect)}, turns
        ),
        aim=1 / 1.6,
        budget=f"{threads} threads",
        details={"images": images, "model": model},
    )


def bench_command(
    folder: Path, *, against: str, model: str = DEFAULT_MODEL, turns: int = 3, images: int = 2048
) -> Iterator[Result]:
    """The command with its defaults in this checkout and another one, on Ray: images per second between the first and
    the last progress, which leaves the start of Ray and of the actors out, and of the whole command."""
    source = folder / "scenes"
    write_scenes(source, images, different=64)
    roots = {THIS: Path(__file__).parents[2], OTHER: Path(against)}
    number = count()
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in roots}

    def run(name: str) -> float:
        path = os.pathsep.join([str(roots[name]), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", str(WORKER), model, str(source), str(folder / f"out-{next(number)}")]
        seen[name].append(answer_once(f"label in {roots[name]}", command, os.environ | {"PYTHONPATH": path}, folder))
        return seen[name][-1]["images_per_second"]

    rates = in_turns({name: lambda name=name: run(name) for name in roots}, turns)  # type: ignore[misc]
    whole = {name: [images / run["seconds"] for run in runs] for name, runs in seen.items()}
    driver = {name: min(run["driver_cpu"] / images * 1e3 for run in runs) for name, runs in seen.items()}
    details = {"images": images, "model": model, "driver_ms_per_image": driver}
    budget = f"{os.cpu_count()} cores"
    yield Result("label, once running", "images/s", rates, aim=1.6, budget=budget, details=details)
    yield Result("label, with its start", "images/s", whole, budget=budget, details=details)


class _Worker:
    """A worker of `lumen-ray label` in this process."""

    def __init__(self, output: Path, model: str, threads: int):
        self._output, self._runs = output, count()
        self._model, self._threads = model, threads
        self.engine = Engine.load(model)

    def requests(self, *tasks: str) -> list[Request]:
        """Requests about an image; poses of the classes that the model has keypoints for."""
        requests = build_requests(tasks, self.engine.classes, {"vqa": [QUESTION]} if "vqa" in tasks else {})
        return Labeller(self._settings(requests)).asker.requests

    def rate(self, paths: Sequence[Path], requests: Sequence[Request]) -> float:
        """Images per second of CPU time of this process, its reading threads included, from files to a ledger."""
        labeller = Labeller(self._settings(requests))
        labeller.engine = self.engine
        items = [Item(path.name, str(path)) for path in paths]
        fragments = [
            Fragment(number, tuple(items[start : start + FRAGMENT]))
            for number, start in enumerate(range(0, len(items), FRAGMENT))
        ]
        seconds = _cpu_seconds(lambda: labeller.label(fragments))
        if (done := labeller.ledger.totals()["labelled"]) != len(items):
            raise SidesDiffer(f"{done} of {len(items)} images are labelled")
        shutil.rmtree(labeller.ledger.output)
        return len(items) / seconds

    def check_equal(self, paths: Sequence[Path], pixels: Sequence[Any], requests: Sequence[Request]) -> str:
        """Raises `SidesDiffer` unless the bare loop and a worker find as many instances."""
        labeller = Labeller(self._settings(requests))
        fragment = Fragment(0, tuple(Item(path.name, str(path)) for path in paths))
        labeller.label([fragment])
        stored = labeller.ledger.totals()["instances"].get("detect", 0)
        answers = _run(self.engine, pixels, requests)
        found = sum(len(p) for row in answers for answer in row for p in answer.predictions)
        if stored != found:
            raise SidesDiffer(f"the worker finds {stored} instances and the bare loop {found}")
        return "the number of instances"

    def _settings(self, requests: Sequence[Request]) -> WorkerSettings:
        output = self._output / str(next(self._runs))
        return WorkerSettings(
            self._load, tuple(requests), "cpu", score_threshold=THRESHOLD, threads=self._threads, output=str(output)
        )

    def _load(self) -> Engine:
        return self.engine


def _run(engine: Engine, images: Sequence[Any], requests: Sequence[Request], batch: int = 8) -> list[Any]:
    answers: list[Any] = []
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        answers += engine.run(some, [requests] * len(some), score_threshold=THRESHOLD)
    return answers


def _cpu_seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def write_scenes(folder: Path, number: int, different: int | None = None) -> list[Path]:
    """JPEG files of scenes of 128 x 128 pixels; of more than `different`, the rest are hard links to the first."""
    folder.mkdir(parents=True)
    paths = [folder / f"{n:06d}.jpg" for n in range(number)]
    for n, path in enumerate(paths):
        if different is not None and n >= different:
            path.hardlink_to(paths[n % different])
        else:
            path.write_bytes(encode_jpeg(render(30_000, n).image))
    return paths


def write_photographs(folder: Path, number: int) -> list[Path]:
    """JPEG files of 24 megapixels: an enlarged scene with noise, so that it compresses like a photograph."""
    folder.mkdir(parents=True)
    image = Image.fromarray(render(30_000, 0).image).resize(LARGE_SIZE, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(-12, 13, (LARGE_SIZE[1], LARGE_SIZE[0], 1), np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    paths = [folder / f"{n:06d}.jpg" for n in range(number)]
    paths[0].write_bytes(buffer.getvalue())
    for path in paths[1:]:
        path.hardlink_to(paths[0])
    return paths
