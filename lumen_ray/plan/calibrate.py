"""Measures the stages of a label job on this machine, with the job's own code on the user's images."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lumen_ray.data import urls
from lumen_ray.data.images import decode_reduced
from lumen_ray.errors import UserError
from lumen_ray.inference.device import find_device
from lumen_ray.label.inputs import Item, Reader
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.listing import Listing
from lumen_ray.label.passes import Passes
from lumen_ray.label.plan import Plan, reference
from lumen_ray.label.reading import ImageInHand
from lumen_ray.label.requests import build_requests
from lumen_ray.label.runs import Pool, Work, task_size
from lumen_ray.label.workers import Labeller, WorkerSettings
from lumen_ray.model.settings import read_settings
from lumen_ray.plan.pipeline import FRAGMENT
from lumen_ray.plan.process_tree import cpu_seconds, rss_bytes
from lumen_ray.plan.recording import Recording
from lumen_ray.plan.work import count_work
from lumen_ray.structures import check_dtype

MOST_IMAGES = 256
_REPEATS = 5
_PLANNED = 1 << 15  # images of which planning is measured, since files of a few are not like those of many
_EMPTY_TASKS = 160  # of which Ray's costs are measured
_WARM_TASKS = 32
_ENGINE_S = 15.0  # of each number of threads, at most


class _StageTimer(Labeller):
    """A worker whose stages run one after the other and are timed."""

    def answers(self, items: Sequence[Item]) -> tuple[float, float]:
        """(seconds, CPU seconds) of the images of a fragment, from pixels to records: in passes, as a job has them."""
        images = self._read(items, None if self.settings.tiles else self.engine.largest_side)
        began, used = time.perf_counter(), time.process_time()
        passes: Passes[ImageInHand] = Passes(self.settings.batch_size, self.engine.image_size)
        full = [some for image in images if image.is_ready for some in self._full_passes(passes, image)]
        for some in (*full, *passes.rest()):
            self._answer(some)
        self.last = images
        return time.perf_counter() - began, time.process_time() - used

    def publish(self, number: int, images: Sequence[Any]) -> None:
        self.ledger.publish(number, len(images), [record for image in images for record in image.records], [])


class _Repeated:
    """A listing of many images: some, again and again, with ids of their own."""

    left_out: Counter[str] = Counter()

    def __init__(self, items: Sequence[Item], number: int):
        self._items, self._number = items, number

    def __iter__(self) -> Iterator[Item]:
        for n in range(self._number):
            item = self._items[n % len(self._items)]
            yield replace(item, image_id=f"{item.image_id}/{n}", record=str(n))


def calibrate(
    source: str | Path,
    *,
    model: str,
    tasks: Sequence[str],
    classes: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    say: Callable[[str], None] = lambda line: None,
) -> Recording:
    """Measures listing, reading, decoding, model, publishing and Ray's costs on up to `MOST_IMAGES` of the images of
    `source`. Takes a minute or two; starts a local Ray, or uses that of `RAY_ADDRESS`.

    say: called with a line before each part. Raises `UserError` as `label` does for its arguments.
    """
    listing = Listing(source)
    listing.check()
    items = [item for item, _ in zip(listing, range(MOST_IMAGES), strict=False)]
    requests = build_requests(tasks, classes) if classes else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"reading and decoding {len(items)} images")
        labeller = _StageTimer(
            WorkerSettings(
                model, tuple(requests), find_device(device), batch_size, dtype=check_dtype(dtype), threads=1,
                output=str(folder / "labels"),
            )
        )  # fmt: skip
        if labeller.fault:
            raise UserError(labeller.fault, "unusable_model")
        if not classes:
            requests = build_requests(tasks, labeller.engine.classes)
            labeller = _again(labeller, requests)
        samples = {"listing": _listing(listing, items, folder)}
        reading, decoding, sizes, pixels = _images(items, labeller.engine.largest_side)
        samples |= {"reading": reading, "decoding": decoding}
        wall, cpu = _model(labeller, items, batch_size, say)
        samples["publishing"] = _publishing(labeller, items, folder)
        say("starting Ray and an actor")
        samples |= (ray := _Ray(folder, labeller.settings, items, wall)).measure()
    engine = labeller.engine
    num_classes = max([0, *(len(request.phrases) for request in labeller.asker.requests)])
    return Recording(
        model=model,
        preset=engine.preset,
        device="cuda" if str(labeller.settings.device).startswith("cuda") else "cpu",
        dtype=dtype,
        tasks=list(tasks),
        num_classes=num_classes,
        batch_size=batch_size,
        images=len(items),
        image_bytes=float(np.mean(sizes)),
        megapixels=float(np.mean(pixels)) / 1e6,
        longest_side=engine.largest_side,
        cores=os.cpu_count() or 1,
        machine=_processor(),
        samples=samples,
        model_wall=wall,
        model_cpu=cpu,
        ray_start_s=ray.start_s,
        work=asdict(count_work(read_settings(model), tasks, num_classes)),
        facts={"actor_bytes": ray.actor_bytes},
    )


def _again(labeller: _StageTimer, requests: Sequence[Any]) -> _StageTimer:
    """The worker with other requests and the same engine."""
    engine = labeller.engine
    made = _StageTimer(replace(labeller.settings, model=lambda: engine, requests=tuple(requests)))
    if made.fault:
        raise UserError(made.fault, "unusable_model")
    made.settings = replace(made.settings, model=labeller.settings.model)
    return made


def _listing(listing: Listing, items: Sequence[Item], folder: Path) -> list[float]:
    """Seconds per image of finding it, and of planning and handing it out: of this process where the input is local."""
    clock = time.perf_counter if urls.is_url(listing.source) else time.process_time
    found = []
    for n in range(_REPEATS):
        began = clock()
        number = sum(1 for _, _ in zip(listing, range(20 * MOST_IMAGES), strict=False))
        walked = (clock() - began) / number
        plan = Plan(str(folder / f"plan-{n}"))
        many: Any = _Repeated(items, _PLANNED // _REPEATS)
        began = clock()
        for task in Work(plan, (), many).tasks():
            reference(task)
        found.append(walked + (clock() - began) / (_PLANNED // _REPEATS))
    return found


def _images(items: Sequence[Item], side: int) -> tuple[list[float], list[float], list[int], list[int]]:
    """Of each image: seconds of reading, CPU seconds of decoding and hashing, bytes, pixels."""
    reader = Reader()
    rows = []
    for item in items:
        began = time.perf_counter()
        data = reader.read(item)
        read = time.perf_counter() - began
        if isinstance(data, UserError):
            continue
        used = time.thread_time()
        try:
            picture = decode_reduced(data, side)
            hashlib.sha256(data).hexdigest()
        except UserError:
            continue
        rows.append((read, time.thread_time() - used, len(data), picture.size[0] * picture.size[1]))
    if not rows:
        raise UserError("none of the images can be read; give a folder of images to --calibrate", "empty_input")
    reading, decoding, sizes, pixels = (list(column) for column in zip(*rows, strict=True))
    return reading, decoding, sizes, pixels


def _model(
    labeller: _StageTimer, items: Sequence[Item], batch: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and CPU seconds per batch, of fragments, by the number of threads: one, and all cores. Images of one
    input size share passes, which are fuller the more images there are to choose from."""
    import torch

    before = torch.get_num_threads()
    fragments = [items[start : start + FRAGMENT] for start in range(0, len(items) - FRAGMENT + 1, FRAGMENT)] or [items]
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        say(f"model, {threads} thread{'s' if threads > 1 else ''}")
        torch.set_num_threads(threads)
        ends = time.monotonic() + _ENGINE_S
        labeller.answers(fragments[0])  # the first pass makes what is kept
        measured = []
        for some in fragments:
            seconds, used = labeller.answers(some)
            measured.append((seconds * batch / len(some), used * batch / len(some)))
            if time.monotonic() > ends:
                break
        wall[str(threads)], cpu[str(threads)] = (list(column) for column in zip(*measured, strict=True))
    torch.set_num_threads(before)
    return wall, cpu


def _publishing(labeller: _StageTimer, items: Sequence[Item], folder: Path) -> list[float]:
    """CPU seconds of publishing the labels of a fragment."""
    labeller.answers(items[: labeller.settings.batch_size])
    answered = [image for image in labeller.last if not image.reason] or labeller.last
    images = (answered * FRAGMENT)[:FRAGMENT]
    found = []
    for number in range(32):
        used = time.process_time()
        labeller.publish(number, images)
        found.append(time.process_time() - used)
    return found[2:]


def null_engine() -> Any:
    """An engine for actors that find all their fragments done."""
    facts: dict[str, Any] = {"version": "", "preset": "", "chosen_decoders": {}, "edges": {}, "skeletons": {}}
    return SimpleNamespace(**facts, image_size=64, largest_side=64)


class _Ray:
    """Ray's costs: of tasks without work, whose fragments are done already, and of the start of an actor."""

    def __init__(self, folder: Path, settings: WorkerSettings, items: Sequence[Item], wall: dict[str, list[float]]):
        self._folder, self._settings, self._items, self._wall = folder, settings, items, wall
        self.start_s = 0.0
        self.actor_bytes = 0

    def measure(self) -> dict[str, list[float]]:
        """Samples of driver, worker, start and finishing."""
        from lumen_ray.ray_env import init_local, prepare_environment, shutdown

        prepare_environment()
        import ray

        was_running = ray.is_initialized()
        began = time.perf_counter()
        init_local()
        self.start_s = time.perf_counter() - began
        try:
            return {"start": [self._actor_start()], **self._tasks()}
        finally:
            if not was_running:
                shutdown()

    def _actor_start(self) -> float:
        """Seconds until an actor returns its first fragment, without the time that the model takes."""
        ledger = Ledger(str(self._folder / "start"))
        items: Any = _Repeated(self._items, FRAGMENT)
        settings = replace(self._settings, output=ledger.output)
        ledger.open({})
        began = time.perf_counter()
        for outcome in Pool(1).run(Work(ledger.plan(), (), items), settings):
            if outcome.fault:
                raise UserError(outcome.fault, "unusable_model")
            if outcome.stop:
                raise UserError(*outcome.stop)
            self.actor_bytes = max([0, *rss_bytes("LabelActor")])
        most = self._wall[max(self._wall, key=int)]
        batches = FRAGMENT / self._settings.batch_size
        return max(0.1, time.perf_counter() - began - batches * float(np.mean(most)))

    def _tasks(self) -> dict[str, list[float]]:
        ledger = Ledger(str(self._folder / "empty"))
        ledger.open({})
        plan, number = ledger.plan(), sum(map(task_size, range(_EMPTY_TASKS)))
        items: Any = _Repeated(self._items, number * FRAGMENT)
        for fragment in plan.fragments(items):
            ledger.publish(fragment.index, len(fragment.items), [], [])
        finishing = []
        for _ in range(3):
            began = time.perf_counter()
            ledger.remove_leftovers()
            ledger.write_errors()
            finishing.append((time.perf_counter() - began) / number)
        settings = replace(self._settings, model=null_engine, output=ledger.output, requests=())
        marks = []
        for _ in Pool(1).run(Work(plan, (), None), settings):
            marks.append((time.process_time(), cpu_seconds()))
        driver, tree = (np.array(column)[_WARM_TASKS:] for column in zip(*marks, strict=True))
        of_driver = _steps(driver)
        of_all = _steps(tree)
        return {
            "driver": of_driver,
            "worker": [max(0.0, a - d) for a, d in zip(of_all, of_driver, strict=True)],
            "finishing": finishing,
        }


def _steps(marks: np.ndarray) -> list[float]:
    """Seconds per task, in blocks of 16 tasks: CPU times of other processes come in hundredths of a second."""
    return ((marks[16::16] - marks[:-16:16]) / 16).tolist()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
