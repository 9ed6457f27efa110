"""The pipeline of a label job as a simulation: lister, driver and actors as in `label/runs.py` and `label/workers.py`.

An actor reads and decodes a batch while the model has the one before, and publishes a fragment while it goes on with
the next ones. The lister hands out tasks, which grow with the job; the driver gives an actor its next task while it
works on one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lumen_ray.label.runs import task_size
from lumen_ray.label.workers import FETCHED_AT_ONCE, PUBLISHED_BEHIND
from lumen_ray.plan.events import Process, Queue, Shared, Simulation, Wait
from lumen_ray.plan.times import Draws, StageTimes

#: Ray Data's tasks of an actor: one that runs and one that waits
TASKS_IN_FLIGHT = 2
FRAGMENT = 32  # images
#: listed tasks that wait for the driver, per actor
_LISTED_AHEAD = 4


@dataclass(frozen=True)
class Cluster:
    """What a job runs on.

    actors: with a model each, `actors_per_node` on a node of `cores` cores. threads: with which an actor decodes.
    storage: bytes per second that the images' store gives to all actors; link: to one of them. on_one_machine: the
    driver and the lister share the cores of the actors. losses_per_hour: nodes that are lost, of all; each is replaced
    after `replace_s` seconds.
    """

    actors: int
    cores: float
    actors_per_node: int = 1
    threads: int = 1
    storage: float = math.inf
    link: float = math.inf
    on_one_machine: bool = False
    losses_per_hour: float = 0.0
    replace_s: float = 300.0

    def share(self, most: int) -> tuple[Cluster, float]:
        """A cluster of at most `most` actors with their share of the storage, and this share of the whole."""
        number = min(self.actors, max(most, self.actors_per_node))
        share = number / self.actors
        return replace(self, actors=number, storage=self.storage * share), share


@dataclass
class _Task:
    """`fragments`: images of each that is not published."""

    fragments: list[int]


@dataclass
class _Actor:
    inbox: Queue
    cores: Shared
    node: int
    in_flight: int = 0
    is_up: bool = False
    is_lost: bool = False


@dataclass(frozen=True)
class Mark:
    """The state of a simulation at a time: images published, tasks done, and the seconds or work spent by stage."""

    now: float
    images: int
    tasks: int
    spent: Counter[str]


class Pipeline:
    """A label job on a cluster.

    images: of the whole job; None: without end. fragments: of every task; None: as in a job, where tasks grow.
    is_warm: actors are up from the start. shared: the share of driver and lister that this (part of a) cluster has.
    """

    def __init__(
        self,
        cluster: Cluster,
        times: StageTimes,
        image_bytes: float,
        *,
        images: int | None = None,
        fragments: int | None = None,
        is_warm: bool = False,
        shared: float = 1.0,
        seed: int = 0,
    ):
        self.cluster, self.times = cluster, times
        self.simulation = Simulation()
        self.images = self.tasks = 0
        self._bytes, self._total, self._fragments, self._is_warm = image_bytes, images, fragments, is_warm
        rng = np.random.default_rng(seed)
        self._rng = rng
        batch = min(times.batch_size, FRAGMENT)
        self._reading, self._decoding = Draws(times.reading, batch, rng), Draws(times.decoding, batch, rng)
        self._model, self._publishing = Draws(times.model, 1, rng), Draws(times.publishing, 1, rng)
        self._driver, self._worker, self._start = (Draws(s, 1, rng) for s in (times.driver, times.worker, times.start))
        simulation = self.simulation
        nodes = math.ceil(cluster.actors / cluster.actors_per_node)
        self._nodes = [Shared(simulation, cluster.cores) for _ in range(nodes)]
        self._storage = Shared(simulation, cluster.storage)
        self._head = self._nodes[0] if cluster.on_one_machine else Shared(simulation, 2 * shared)
        self._speed = 1.0 if cluster.on_one_machine else shared  # of the head's single threads
        self._listed = Queue(simulation, _LISTED_AHEAD * cluster.actors)
        self._free = Queue(simulation)  # one value for each task that an actor has room for
        self._spent: Counter[str] = Counter()
        self._actors = [
            _Actor(Queue(simulation), self._nodes[n // cluster.actors_per_node], n // cluster.actors_per_node)
            for n in range(cluster.actors)
        ]
        simulation.start(self._lister())
        simulation.start(self._dispatcher())
        for actor in self._actors:
            simulation.start(self._actor(actor))
        if cluster.losses_per_hour:
            simulation.start(self._losses())

    def run_to_end(self) -> float:
        """Seconds until all images are labelled."""
        assert self._total is not None
        self.simulation.run(lambda: self.images >= (self._total or 0))
        return self.simulation.now

    def run_to_task(self, number: int) -> Mark:
        """Runs until `number` tasks are done."""
        self.simulation.run(lambda: self.tasks >= number)
        return self.mark()

    def mark(self) -> Mark:
        spent = self._spent.copy()
        spent["storage"] = self._storage.done["reading"]  # bytes
        spent["cores"] = sum(sum(node.done.values()) for node in self._nodes)
        return Mark(self.simulation.now, self.images, self.tasks, spent)

    def _tasks(self) -> Iterator[_Task]:
        left, number = self._total, 0
        while left is None or left > 0:
            count = (self._fragments or task_size(number)) * FRAGMENT
            count = count if left is None else min(count, left)
            sizes = [FRAGMENT] * (count // FRAGMENT) + ([count % FRAGMENT] if count % FRAGMENT else [])
            yield _Task(sizes)
            left, number = None if left is None else left - count, number + 1

    def _spend(self, stage: str, began: float) -> None:
        self._spent[stage] += self.simulation.now - began  # type: ignore[assignment]

    def _lister(self) -> Process:
        for task in self._tasks():
            began = self.simulation.now
            yield self._head.use(self.times.listing.mean * sum(task.fragments), self._speed, "listing")
            self._spend("listing", began)
            yield self._listed.put(task)

    def _dispatcher(self) -> Process:
        while True:
            yield self._free.take()
            task = yield self._listed.take()
            began = self.simulation.now
            yield self._head.use(self._driver.draw(), self._speed, "driver")
            self._spend("driver", began)
            while not (up := [actor for actor in self._actors if actor.is_up and actor.in_flight < TASKS_IN_FLIGHT]):
                yield self._free.take()  # the actor that had room is lost
            actor = min(up, key=lambda actor: actor.in_flight)
            actor.in_flight += 1
            yield actor.inbox.put(task)

    def _actor(self, actor: _Actor) -> Process:
        if not self._is_warm:
            yield actor.cores.use(self._start.draw(), 1.0, "start")
        while True:
            actor.is_up, actor.is_lost = True, False
            for _ in range(TASKS_IN_FLIGHT - actor.in_flight):
                yield self._free.put(None)
            while not actor.is_lost:
                task = yield actor.inbox.take()
                yield from self._label(actor, task)
                actor.in_flight -= 1
                if task.fragments:  # unpublished ones: the node is lost
                    break
                self.tasks += 1
                yield self._free.put(None)
            actor.is_up = False
            yield self._listed.put(task)
            yield self.simulation.sleep(self.cluster.replace_s + self._start.draw())

    def _label(self, actor: _Actor, task: _Task) -> Process:
        """Labels a task, and removes each fragment from it that is published."""
        times, simulation = self.times, self.simulation
        if times.request_s:
            began = simulation.now
            # whether each fragment is done already
            yield simulation.sleep(times.request_s * math.ceil(len(task.fragments) / FETCHED_AT_ONCE))
            self._spend("publishing", began)
        yield actor.cores.use(self._worker.draw(), 1.0, "worker")
        size = times.batch_size
        batches = [
            (min(size, images - start), start + size >= images)
            for images in task.fragments
            for start in range(0, images, size)
        ]
        coming = simulation.start(self._read(actor, batches[0][0]))
        publishing: list[Wait] = []
        for number, (images, is_last) in enumerate(batches):
            yield coming
            if number + 1 < len(batches):
                coming = simulation.start(self._read(actor, batches[number + 1][0]))
            began = simulation.now
            yield actor.cores.use(self._model.draw() * images / size, times.model_cores, "model")
            self._spend("model", began)
            if actor.is_lost:
                return
            if is_last:
                publishing.append(simulation.start(self._publish(actor, task, publishing[-1:])))
                if len(publishing) > PUBLISHED_BEHIND:
                    yield publishing.pop(0)
        yield from publishing

    def _publish(self, actor: _Actor, task: _Task, before: Sequence[Wait]) -> Process:
        """Publishes the next fragment of a task once that `before` it is published."""
        yield from before
        began = self.simulation.now
        yield actor.cores.use(self._publishing.draw(), 1.0, "publishing")
        if self.times.request_s:
            yield self.simulation.sleep(2 * self.times.request_s)  # labels, then the entry in the ledger
        self._spend("publishing", began)
        if not actor.is_lost:
            self.images += task.fragments.pop(0)

    def _read(self, actor: _Actor, images: int) -> Process:
        """Reads a batch and decodes it, several images at once where there are threads for them."""
        simulation, threads = self.simulation, min(self.cluster.threads, images)
        share = images / min(self.times.batch_size, FRAGMENT)
        began = simulation.now
        fetched = simulation.start(self._fetch(images, share))
        if threads == 1:
            yield fetched
            self._spend("reading", began)
        decoding = simulation.now
        yield actor.cores.use(self._decoding.draw() * share, threads, "decoding")
        self._spend("decoding", decoding)
        if threads > 1:
            yield fetched
            self._spend("reading", began)

    def _fetch(self, images: int, share: float) -> Process:
        at_once = min(self.times.read_at_once, images)
        yield self.simulation.sleep(self._reading.draw() * share / at_once)
        if math.isfinite(self.cluster.storage) or math.isfinite(self.cluster.link):
            rate = min(self.cluster.link, self.cluster.storage)
            yield self._storage.use(images * self._bytes, rate, "reading")

    def _losses(self) -> Process:
        while True:
            yield self.simulation.sleep(float(self._rng.exponential(3600 / self.cluster.losses_per_hour)))
            node = int(self._rng.integers(len(self._nodes)))
            for actor in self._actors:
                actor.is_lost |= actor.node == node and actor.is_up
