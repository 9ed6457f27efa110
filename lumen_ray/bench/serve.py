"""The speed of `lumen-ray serve` on one machine beside the engine in a process: latency, throughput and CPU time of the
deployments, of one process, and, if wanted, of another checkout.

All sides run at once and are measured in turns; those that are not asked cost a few percent of a core each. Scenes of
128 x 128 pixels are detected from JPEG bytes: the engine decodes them too. Every request has an image that the server
has not seen, but for `cached`.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lumen_ray.bench.label import write_scenes
from lumen_ray.bench.serve_load import numbered
from lumen_ray.bench.serve_sides import REPORT_S, Client, EngineSide, ServerSide, haproxy_environment
from lumen_ray.bench.timing import Result, SidesDiffer
from lumen_ray.presets import DEFAULT_MODEL, model_folder
from lumen_ray.serve.app import model_settings
from lumen_ray.serve.settings import ServeSettings

ENGINE, ONE, DEPLOYMENTS, OTHER = "engine", "one_process", "deployments", "other checkout"
HAPROXY = "one_process, HAProxy"
IMAGES = 64
THRESHOLD = 0.3
BATCH = 8
CLIENTS = (8, 16)
REQUESTS = 100  # of a side in a turn, at concurrency 1
SECONDS = 5.0  # of a side in a turn, under load
CONNECTIONS = 64  # for requests that arrive at random moments
#: most milliseconds that HTTP may add to the engine's
ADDED = {"p50": 8.0, "p99": 30.0}
#: least images per second, over the engine's on all cores
THROUGHPUT = {ONE: 0.9, DEPLOYMENTS: 0.75}
#: the engine's CPU time of an image, over that of all processes of a server
CPU = {ONE: 0.97, DEPLOYMENTS: 17 / 24}
#: share of the engine's throughput at which requests arrive by default
RATE = 0.5


@dataclass(frozen=True)
class Sides:
    engine: EngineSide
    servers: Mapping[str, ServerSide]
    client: Client
    classes: tuple[str, ...]
    threads: int
    close: Callable[[], None]

    def run_engine(self, **options: Any) -> dict[str, Any]:
        return self.engine.run(self.classes, THRESHOLD, **{"threads": self.threads, **options})

    def load(self, name: str, **options: Any) -> dict[str, Any]:
        """Raises `SidesDiffer` if a request is refused."""
        fields = options.pop("fields", [{"classes": self.classes}])
        run = self.client.load(self.servers[name], fields, **options)
        if set(run["statuses"]) != {"200"}:
            raise SidesDiffer(f"{name} answered with the statuses {run['statuses']}")
        return run


def settings_of(model: str, topology: str) -> dict[str, Any]:
    """The settings of a server: one replica of each deployment, which takes twice as many requests as fit a pass."""
    section = {"max_ongoing_requests": 2 * BATCH, "max_queued_requests": 64}
    settings = ServeSettings.model_validate({"model": model})
    decoders = {name: {**section, "num_cpus": 0.5} for name in model_settings(settings).decoder_names}
    made = {"model": model, "trunk": {**section, "num_cpus": 1}, "decoders": decoders}
    return made if topology == DEPLOYMENTS else {**made, "topology": topology}


@cache
def start(model: str, against: str | None, threads: int, haproxy: bool = False) -> Sides:
    """The sides, which all benches share; they end with this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lumen-bench-")))
    write_scenes(folder / "scenes", IMAGES)
    source, here = str(model_folder(model).resolve()), Path(__file__).parents[2]
    places: dict[str, tuple[Path, str, dict[str, str]]] = {ONE: (here, ONE, {}), DEPLOYMENTS: (here, DEPLOYMENTS, {})}
    if haproxy:
        places[HAPROXY] = (here, ONE, haproxy_environment(folder))
    if against:
        places[OTHER] = (Path(against).resolve(), DEPLOYMENTS, {})
    servers = {}
    for name, (root, topology, variables) in places.items():
        settings = settings_of(source, topology)
        servers[name] = ServerSide(name, root, settings, folder / name.replace(", ", "-"), threads, variables)
        stack.callback(servers[name].close)
        servers[name].await_ready()
    engine = EngineSide(source, folder / "scenes", threads)
    stack.callback(engine.close)
    client = Client(folder / "scenes")
    stack.callback(client.close)
    sides = Sides(engine, servers, client, tuple(engine.classes), threads, stack.close)
    _check_equal(sides, folder / "scenes")
    for name in servers:
        sides.load(name, clients=BATCH, count=10 * BATCH)
    return sides


def _check_equal(sides: Sides, images: Path) -> None:
    """Raises `SidesDiffer` unless the servers find what the engine finds."""
    expected = sides.run_engine(batch=1, count=4, keep=True)["found"]
    for name, server in sides.servers.items():
        for number, (path, instances) in enumerate(zip(sorted(images.glob("*.jpg")), expected, strict=False)):
            found = _instances(server, numbered(path.read_bytes(), -1 - number), sides.classes)
            same = len(found) == len(instances) and all(
                a["phrase"] == b["phrase"]
                and abs(a["score"] - b["score"]) < 1e-3
                and max(abs(x - y) for x, y in zip(a["box"], b["box"], strict=True)) < 0.05
                for a, b in zip(found, instances, strict=True)
            )
            if not same:
                raise SidesDiffer(f"{name} finds other instances than the engine in {path.name}")


def _instances(server: ServerSide, jpeg: bytes, classes: Sequence[str]) -> list[dict[str, Any]]:
    body = json.dumps({"image": base64.b64encode(jpeg).decode(), "classes": classes}).encode()
    url = f"http://127.0.0.1:{server.port}/v1/detect"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())["instances"]


def percentiles(took: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    ordered = sorted(took)
    return {f"p{share}": 1000 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90, 99)}


def latency(sides: Sides, turns: int) -> Iterator[Result]:
    """One client: the time of a request beside the engine's with one image."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (ENGINE, *sides.servers)}
    for _ in range(turns):
        found[ENGINE].append(percentiles(sides.run_engine(batch=1, count=REQUESTS)["took"]))
        for name in sides.servers:
            found[name].append(percentiles(sides.load(name, clients=1, count=REQUESTS)["took"]))
    for name in sides.servers:
        for share, most in ADDED.items():
            added = [there[share] - here[share] for there, here in zip(found[name], found[ENGINE], strict=True)]
            yield Result(
                f"latency {share}, {name}",
                "ms",
                {"aim": [most] * turns, f"added to the {ENGINE}'s": added},
                aim=None if name == OTHER else 1,
                budget=_budget(sides),
                equal="instances of 4 images",
                details={ENGINE: [each[share] for each in found[ENGINE]], name: [each[share] for each in found[name]]},
            )


@dataclass
class _EngineLoad:
    """The turns of the engine: images per second, and milliseconds of CPU time of an image."""

    rates: list[float]
    cpu_ms: list[float]


@dataclass
class _Load:
    """The turns of a server under load: as of the engine, by process, and of the client. `batch`: images of a pass."""

    rates: list[float]
    by_process: list[dict[str, float]]
    client_ms: list[float]
    batch: float | None = None


def throughput(sides: Sides, turns: int) -> Iterator[Result]:
    """Several clients without a pause: images per second, CPU time of an image, and images of a trunk's pass."""
    for clients in CLIENTS:
        engine = _EngineLoad([], [])
        loads = {name: _Load([], [], []) for name in sides.servers}
        before = _counts(sides)
        for _ in range(turns):
            _run_engine(sides, engine)
            for name, load in loads.items():
                _run_server(sides, name, clients, load)
        after = _counts(sides)
        for name, load in loads.items():
            requests, passes = (now - then for now, then in zip(after[name], before[name], strict=True))
            load.batch = requests / passes if passes else None
            yield from _compared(sides, name, clients, load, engine)


def _run_engine(sides: Sides, load: _EngineLoad) -> None:
    """A turn with the threads of a pass of the servers, and one with all cores, whichever is faster."""
    rates = []
    for threads in {sides.threads, os.cpu_count() or 1}:
        run = sides.run_engine(batch=BATCH, seconds=SECONDS, threads=threads)
        images = len(run["took"]) * BATCH
        rates.append(images / run["seconds"])
        if threads == sides.threads:
            load.cpu_ms.append(1000 * run["cpu"] / images)
    load.rates.append(max(rates))


def _run_server(sides: Sides, name: str, clients: int, load: _Load) -> None:
    before = sides.servers[name].cpu()
    run = sides.load(name, clients=clients, count=int(400 * SECONDS), seconds=SECONDS)
    after = sides.servers[name].cpu()
    images = len(run["took"])
    load.rates.append(images / run["seconds"])
    load.by_process.append({role: 1000 * (after[role] - before.get(role, 0)) / images for role in after})
    load.client_ms.append(1000 * run["cpu"] / images)


def _counts(sides: Sides) -> dict[str, tuple[float, float]]:
    time.sleep(REPORT_S)
    return {name: server.trunk_counts() for name, server in sides.servers.items()}


def _compared(sides: Sides, name: str, clients: int, load: _Load, engine: _EngineLoad) -> Iterator[Result]:
    budget = _budget(sides)
    yield Result(
        f"throughput, {clients} clients, {name}",
        "images/s",
        {name: load.rates, ENGINE: engine.rates},
        aim=THROUGHPUT.get(name),
        budget=budget,
        note=f"the engine in batches of {BATCH}, with the threads of a pass or all cores, whichever is faster",
    )
    yield Result(
        f"CPU time, {clients} clients, {name}",
        "ms per image",
        {ENGINE: engine.cpu_ms, name: [sum(turn.values()) for turn in load.by_process]},
        aim=CPU.get(name),
        budget=budget,
    )
    roles = sorted(load.by_process[-1], key=lambda role: -load.by_process[-1][role])
    by_process = {role: [turn.get(role, 0.0) for turn in load.by_process] for role in roles}
    batch = "an unknown number of" if load.batch is None else f"{load.batch:.1f}"
    yield Result(
        f"CPU time by process, {clients} clients, {name}",
        "ms per image",
        by_process | {"client": load.client_ms},
        budget=budget,
        note=f"a pass of the trunk has {batch} images",
        details={"trunk_batch": load.batch},
    )


def cached(sides: Sides, turns: int) -> Iterator[Result]:
    """One client asks each image two questions: the second one finds it held."""
    half = len(sides.classes) // 2
    fields = [{"classes": sides.classes[:half]}, {"classes": sides.classes[half:]}]
    for name in sides.servers:
        rates: dict[str, list[float]] = {"second": [], "first": []}
        for _ in range(turns):
            took = sides.load(name, fields=fields, clients=1, count=REQUESTS // 2)["took"]
            rates["first"].append(1 / statistics.median(took[0::2]))
            rates["second"].append(1 / statistics.median(took[1::2]))
        yield Result(f"a further task about an image, {name}", "requests/s", rates, budget=_budget(sides))


def load(sides: Sides, turns: int, rate: float | None) -> Iterator[Result]:
    """Requests that arrive at random moments, the same ones at each server."""
    if rate is None:
        run = sides.run_engine(batch=BATCH, seconds=SECONDS, threads=os.cpu_count() or 1)
        rate = round(RATE * len(run["took"]) * BATCH / run["seconds"], 1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides.servers}
    for turn in range(turns):
        for name in sides.servers:
            options = {"clients": CONNECTIONS, "count": int(rate * SECONDS * 4), "seconds": 2 * SECONDS}
            found[name].append(percentiles(sides.load(name, rate=rate, seed=turn, **options)["took"]))
    for name, turns_of_side in found.items():
        rates = {share: [turn[share] for turn in turns_of_side] for share in ("p50", "p90", "p99")}
        yield Result(f"{rate:g} requests/s, {name}", "ms", rates, budget=_budget(sides), details={"rate": rate})


def _budget(sides: Sides) -> str:
    return f"{os.cpu_count()} cores, {sides.threads} threads for a pass"


def bench(
    name: str,
    *,
    model: str = DEFAULT_MODEL,
    against: str | None = None,
    threads: int = 1,
    turns: int = 3,
    rate: float | None = None,
    haproxy: bool = False,
) -> Iterator[Result]:
    """One of 'latency', 'throughput', 'cached' and 'load'. `against`: the folder of another checkout; `rate`: requests
    per second of 'load', by default `RATE` of the engine's throughput; `haproxy`: also one process behind HAProxy."""
    sides = start(model, against, threads, haproxy)
    if name == "load":
        return load(sides, turns, rate)
    return {"latency": latency, "throughput": throughput, "cached": cached}[name](sides, turns)
