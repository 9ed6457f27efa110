"""Detection of three classes on photographs of 640 x 480 pixels: images per second of CPU time from JPEG bytes to
boxes, of the engine with a model of preset `nano-512` and of YOLOv8n at 640 pixels by `ultralytics`' own predict path,
which runs in an environment of its own.

Speed does not depend on what the weights have learned, except for the number of boxes. So both sides have random
weights (or the engine those of a trained model), and each photograph has a threshold of its own on each side, halfway
between the scores of its 15th and 16th best box after NMS: both sides give 15 boxes a photograph, about as many as
BCCD has cells, and NMS reads 15 to 40 candidates. The number of boxes is checked.

Both sides read the photograph in its own shape: YOLOv8n in 640 x 480 pixels, as `ultralytics` does by itself, and a
fresh model in the bucket of 512 x 384. A model that was trained without buckets reads 512 x 512.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from lumen_ray import config
from lumen_ray.bench.json_worker import JsonWorker
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import ModelMeta, build_model, save_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_folder, model_path
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.tokenizer import LumenTokenizer

AIM = 2.5
PRESET, BUCKET = "nano-512", (384, 512)
CLASSES = ("red blood cell", "white blood cell", "platelet")
YOLO_SIDE = 640
WIDTH, HEIGHT = 640, 480  # pixels of the photographs
PHOTOS = 16  # a turn
BOXES = 15  # per photograph
WORKER = Path(__file__).with_name("yolo_worker.py")


def fresh_folder(folder: Path, preset: str = PRESET, bucket: tuple[int, int] = BUCKET) -> Path:
    """Writes a model folder with random weights that detects `CLASSES`; `bucket`: (height, width) of its input."""
    settings = config.load(ModelSettings, model_path(preset))
    texts = [text for task in TASKS.values() for text in task.templates] + list(CLASSES)
    tokenizer = LumenTokenizer.train(texts, settings.vocab_size)
    model = build_model(settings, len(tokenizer))
    meta = ModelMeta(settings.name, classes=list(CLASSES), buckets=[list(bucket)], tasks=["detect"])
    return save_model(folder, model.state_dict(), settings, tokenizer, meta)


def photographs(count: int = PHOTOS) -> tuple[str, list[bytes]]:
    """(source, JPEG bytes): photographs of BCCD in the test data, if `$LUMEN_TEST_DATA` names them, else rendered
    scenes."""
    paths = sorted((Path(os.environ.get("LUMEN_TEST_DATA", "")) / "bccd" / "images").glob("*.jpg"))[:count]
    if len(paths) == count:
        return "bccd", [path.read_bytes() for path in paths]
    return "scenes", [_scene(n) for n in range(count)]


def _scene(number: int) -> bytes:
    """JPEG bytes of a scene, cut to 640 x 480 pixels."""
    buffer = io.BytesIO()
    image = scenes.render(0, number, WIDTH).image[(WIDTH - HEIGHT) // 2 :][:HEIGHT]
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@dataclass
class Pass:
    """A pass over all photographs. `seconds`: "cpu" and "wall"; `scores`: of the boxes of each photograph, best
    first."""

    seconds: dict[str, float]
    scores: list[list[float]]


class Side(Protocol):
    """One side of the comparison."""

    def detect(self, thresholds: Sequence[float]) -> Pass:
        """The boxes of every photograph above its threshold."""


@dataclass
class Ours:
    """The engine, in this process."""

    engine: Engine
    photos: Sequence[bytes]
    classes: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        self.classes = self.engine.classes or CLASSES

    def detect(self, thresholds: Sequence[float]) -> Pass:
        """See `Side`."""
        request = make_request("detect", classes=self.classes)
        wall, cpu = time.perf_counter(), time.process_time()
        answers = [
            self.engine.run([decode(photo)], [[request]], score_threshold=threshold)[0][0]
            for photo, threshold in zip(self.photos, thresholds, strict=True)
        ]
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return Pass(
            seconds, [sorted((s for p in a.predictions for s in p.scores.tolist()), reverse=True) for a in answers]
        )


class Yolo:
    """`ultralytics` in a process of the interpreter `python`. Raises `UserError` if it stops or runs another number of
    threads."""

    def __init__(self, python: str, photos: Sequence[bytes], classes: int, threads: int, folder: Path):
        self._threads = threads
        # -c: the folder of the script holds modules with common names
        command = [python, "-c", WORKER.read_text(), str(classes), str(YOLO_SIDE), str(threads), str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._worker = JsonWorker("ultralytics", command, env, folder / "ultralytics.log")
        self.close = self._worker.close
        given = {"photos": [base64.b64encode(photo).decode() for photo in photos]}
        try:
            self.versions = self._worker.ask(given)["versions"]
        except BaseException:
            self.close()
            raise

    def detect(self, thresholds: Sequence[float]) -> Pass:
        """See `Side`."""
        found = self._worker.ask({"thresholds": list(thresholds)})
        if found["threads"] != self._threads:
            raise UserError(f"ultralytics runs {found['threads']} threads, not {self._threads}", "bench_failed")
        return Pass(found["seconds"], found["scores"])


def thresholds_for(scores: Sequence[Sequence[float]], count: int) -> list[float]:
    """For each photograph the threshold that its `count` best boxes pass. `scores`: of all its boxes, best first."""
    return [(row[count - 1] + row[count]) / 2 if len(row) > count else 0.0 for row in scores]


def _prepared(name: str, side: Side, photos: int) -> list[float]:
    """Thresholds of the photographs on one side. Raises `SidesDiffer` unless `BOXES` boxes pass on average, to a
    tenth."""
    thresholds = thresholds_for(side.detect([0.0] * photos).scores, BOXES)
    mean = statistics.mean(map(len, side.detect(thresholds).scores))
    if abs(mean - BOXES) > 0.1 * BOXES:
        raise SidesDiffer(f"{name} gives {mean:.1f} boxes a photograph, not {BOXES}")
    return thresholds


def compare(sides: dict[str, Side], photos: int, turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(images per second of CPU time, details) of both sides. Raises `SidesDiffer` if one cannot give `BOXES` boxes."""
    thresholds = {name: _prepared(name, side, photos) for name, side in sides.items()}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    boxes: dict[str, float] = {}

    def rate(name: str) -> float:
        found = sides[name].detect(thresholds[name])
        wall[name].append(photos / found.seconds["wall"])
        boxes[name] = statistics.mean(map(len, found.scores))
        return photos / found.seconds["cpu"]

    rates = in_turns({name: lambda name=name: rate(name) for name in sides}, turns)  # type: ignore[misc]
    return rates, {"boxes": boxes, "images_per_second_of_wall_time": wall}


def check(model: str | None, ultralytics: str | None) -> None:
    """Raises `UserError` for a missing model folder or interpreter."""
    if model is not None:
        model_folder(model)
    if ultralytics is not None and shutil.which(ultralytics) is None:
        raise UserError(f"--ultralytics '{ultralytics}' is no program; give a Python interpreter", "invalid_option")


def bench(
    folder: Path, *, ultralytics: str | None = None, model: str | None = None, threads: int = 1, turns: int = 5
) -> Result:
    """Images per second of CPU time of both sides. `ultralytics`: Python of an environment with that package; without
    one nothing is measured. `model`: a model folder, by default fresh weights of `PRESET`."""
    unit = "images/s of CPU time"
    if ultralytics is None:
        return Result("yolo", unit, {}, skipped="give --ultralytics PYTHON, of an environment with ultralytics")
    source, photos = photographs()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = Engine.load(model_folder(model) if model else fresh_folder(folder / "model"))
        ours = Ours(engine, photos)
        try:
            theirs = Yolo(ultralytics, photos, len(ours.classes), threads, folder)
        except UserError as error:
            return Result("yolo", unit, {}, skipped=str(error))
        try:
            rates, details = compare({"engine": ours, "YOLOv8n": theirs}, len(photos), turns)
        finally:
            theirs.close()
    finally:
        torch.set_num_threads(before)
    return Result(
        "yolo",
        unit,
        rates,
        AIM,
        equal=f"number of boxes, {BOXES} a photograph",
        budget=f"{threads} threads",
        details={
            "photographs": f"{len(photos)} of {source}",
            "model": model or f"{PRESET}, random weights",
            "input": {"engine": list(engine.trunk.bucket((HEIGHT, WIDTH))), "YOLOv8n": [HEIGHT, WIDTH]},
            "ultralytics": theirs.versions,
            **details,
        },
    )
