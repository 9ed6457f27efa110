"""Says what a run waits for while the cluster has no room for its workers, where Ray waits without a word.

Either others use the CPUs or GPUs. Or nobody does, but Ray still keeps them for a run whose driver was killed: where
the number of workers may change (`min_workers`), Ray Train starts no more of them than Ray's autoscaling coordinator
allots to the run, and what a dead run asked the coordinator for stays asked for until it expires.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lumen_ray.console import seconds

Nodes = Mapping[str, Mapping[str, float]]  # resources by node

EVERY_S = 1.0
TOLD_AFTER_S = 10.0  # what a start on a cluster with room takes longer than is no wait for room
KEPT_S = 200.0  # Ray lets requests of Ray Train expire 180 s after they were renewed, and looks for such every 20 s


@dataclass(frozen=True)
class Demand:
    """What a run cannot start without."""

    workers: int
    each: Mapping[str, float]  # resources of a worker

    def __str__(self) -> str:
        resources = " and ".join(f"{amount:g} {name}" for name, amount in self.each.items())
        return f"{self.workers} workers with {resources} each" if self.workers > 1 else f"a worker with {resources}"

    def fits(self, nodes: Nodes) -> bool:
        rooms = (min(has.get(name, 0) // amount for name, amount in self.each.items()) for has in nodes.values())
        return sum(rooms) >= self.workers


class Room(NamedTuple):
    """What a cluster has, what of it nobody uses, and what Ray has set aside for the run; None where it does not."""

    total: Nodes
    free: Nodes
    kept: Nodes | None = None


class Lack(NamedTuple):
    reason: str
    sentence: str


def lack(demand: Demand, room: Room) -> Lack | None:
    """Why a run's workers cannot start; None when they can."""
    if not demand.fits(room.free):
        free = " and ".join(f"{_sum(room.free, name):g} of {_sum(room.total, name):g} {name}" for name in demand.each)
        until = "goes on when others free theirs or a node joins"
        return Lack("used", f"waiting for room for {demand}: the cluster has {free} free; {until}")
    if room.kept is not None and not demand.fits(room.kept):
        by_whom = "Ray still keeps what a killed run had asked for"
        return Lack("kept", f"waiting for room for {demand}: {by_whom}, for {seconds(KEPT_S)} at most")
    return None


def _sum(nodes: Nodes, name: str) -> float:
    return sum(has.get(name, 0) for has in nodes.values())


class RoomWatcher:
    """Tells, once for each reason, why the workers of a run do not start; a context manager around the run.

    `look` gives the cluster's room, or None while the run needs none.
    """

    def __init__(self, demand: Demand, look: Callable[[], Room | None], tell: Callable[[str], None]):
        self._demand, self._look, self._tell = demand, look, tell
        self._reason: str | None = None
        self._since = 0.0
        self._told = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def check(self, now: float) -> None:
        """`now`: a clock's seconds."""
        room = self._look()
        found = room and lack(self._demand, room)
        reason = found.reason if found else None
        if reason != self._reason:
            self._reason, self._since, self._told = reason, now, False
        if found and not self._told and now - self._since >= TOLD_AFTER_S:
            self._told = True
            self._tell(found.sentence)

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            try:
                self.check(time.monotonic())
            except Exception:  # a cluster that cannot be asked now: the run itself says what is wrong, if it is
                continue

    def __enter__(self) -> RoomWatcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)


def wants_room(actors: Iterable[Mapping[str, Any]]) -> bool:
    """Whether Ray Train's controller looks for room, by its job's actors: it makes workers once it has found some.

    Workers take seconds to come up, and their room is no longer free then.
    """
    states = {(actor["ActorClassName"], actor["State"]) for actor in actors}
    there = {name for name, state in states if state != "DEAD"}
    return ("TrainController", "ALIVE") in states and "RayTrainWorker" not in there


def look_at(trainer: Any) -> Callable[[], Room | None]:
    """`look` of a `RoomWatcher` for a Ray Train trainer of this process.

    Ray has no public way to ask what its controller waits for, so this reads Ray's tables of actors and of resources.
    """
    import ray
    from ray._private.state import state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))

    def look() -> Room | None:
        if not wants_room(state.actor_table(None, job).values()):
            return None
        return Room(state.total_resources_per_node(), state.available_resources_per_node(), _kept_for(trainer))

    return look


def _kept_for(trainer: Any) -> Nodes | None:
    """What Ray's autoscaling coordinator has set aside for a run: Ray Train asks it where the number of workers may
    change."""
    import ray

    if not trainer.scaling_config.elasticity_enabled:
        return None
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    requester = f"train-{trainer.train_run_context.run_id}"
    return ray.get(coordinator.get_reserved_resources.remote(requester), timeout=5)
