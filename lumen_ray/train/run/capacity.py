"""Reports why the workers of a run do not start while the cluster lacks resources; Ray itself waits silently.

Either others use the CPUs or GPUs, or Ray still reserves them for a run whose driver was killed: where the number of
workers may change (`min_workers`), Ray Train starts no more of them than Ray's autoscaling coordinator grants the run,
and the requests of a dead run count until they expire.
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
REPORT_AFTER_S = 10.0  # starting workers on a cluster with free resources takes less
RESERVED_S = 200.0  # requests of Ray Train expire 180 s after their renewal; Ray checks for expired ones every 20 s


@dataclass(frozen=True)
class Demand:
    """The resources that a run needs to start."""

    workers: int
    each: Mapping[str, float]  # resources of one worker

    def __str__(self) -> str:
        resources = " and ".join(f"{amount:g} {name}" for name, amount in self.each.items())
        return f"{self.workers} workers with {resources} each" if self.workers > 1 else f"a worker with {resources}"

    def fits(self, nodes: Nodes) -> bool:
        """Whether the workers fit on the nodes, each on one node."""
        slots = (min(has.get(name, 0) // amount for name, amount in self.each.items()) for has in nodes.values())
        return sum(slots) >= self.workers


class Capacity(NamedTuple):
    """A cluster's resources: all, the free ones, and those that Ray has granted the run, None if it need not."""

    total: Nodes
    free: Nodes
    granted: Nodes | None = None


class Shortage(NamedTuple):
    reason: str
    sentence: str


def find_shortage(demand: Demand, capacity: Capacity) -> Shortage | None:
    """Why a run's workers cannot start; None when they can."""
    if not demand.fits(capacity.free):
        total, free = capacity.total, capacity.free
        amounts = " and ".join(f"{_sum(free, name):g} of {_sum(total, name):g} {name}" for name in demand.each)
        until = "training continues when other jobs free resources or a node joins"
        return Shortage("used", f"waiting for resources for {demand}: the cluster has {amounts} free; {until}")
    if capacity.granted is not None and not demand.fits(capacity.granted):
        why = f"Ray still reserves them for a killed run, for {seconds(RESERVED_S)} at most"
        return Shortage("reserved", f"waiting for resources for {demand}: {why}")
    return None


def _sum(nodes: Nodes, name: str) -> float:
    return sum(has.get(name, 0) for has in nodes.values())


class CapacityWatcher:
    """Reports, once for each reason, why the workers of a run do not start; a context manager around the run.

    `read_capacity` returns the cluster's resources, or None while the run does not wait for any.
    """

    def __init__(self, demand: Demand, read_capacity: Callable[[], Capacity | None], report: Callable[[str], None]):
        self._demand, self._read_capacity, self._report = demand, read_capacity, report
        self._reason: str | None = None
        self._since = 0.0
        self._reported = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def check(self, now: float) -> None:
        """Reports a shortage that has lasted `REPORT_AFTER_S`. `now`: seconds of a monotonic clock."""
        capacity = self._read_capacity()
        shortage = find_shortage(self._demand, capacity) if capacity else None
        reason = shortage.reason if shortage else None
        if reason != self._reason:
            self._reason, self._since, self._reported = reason, now, False
        if shortage and not self._reported and now - self._since >= REPORT_AFTER_S:
            self._reported = True
            self._report(shortage.sentence)

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            try:
                self.check(time.monotonic())
            except Exception:  # the cluster does not answer; if that is an error, the run itself raises it
                continue

    def __enter__(self) -> CapacityWatcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)


def waits_for_resources(actors: Iterable[Mapping[str, Any]]) -> bool:
    """Whether Ray Train's controller waits for resources, by its job's actors: it creates workers once it has some.

    Workers take seconds to start, and their resources are no longer free meanwhile.
    """
    states = {(actor["ActorClassName"], actor["State"]) for actor in actors}
    present = {name for name, state in states if state != "DEAD"}
    return ("TrainController", "ALIVE") in states and "RayTrainWorker" not in present


def capacity_reader(trainer: Any) -> Callable[[], Capacity | None]:
    """`read_capacity` of a `CapacityWatcher`, for a Ray Train trainer of this process.

    Ray has no public API for what its controller waits for, so this reads Ray's tables of actors and resources.
    """
    import ray
    from ray._private.state import state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))

    def read() -> Capacity | None:
        if not waits_for_resources(state.actor_table(None, job).values()):
            return None
        return Capacity(state.total_resources_per_node(), state.available_resources_per_node(), _granted_to(trainer))

    return read


def _granted_to(trainer: Any) -> Nodes | None:
    """The resources that Ray's autoscaling coordinator grants a run; None if the number of workers is fixed, as Ray
    Train then needs no grant."""
    import ray

    if not trainer.scaling_config.elasticity_enabled:
        return None
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    requester = f"train-{trainer.train_run_context.run_id}"
    granted: Any = ray.get(coordinator.get_reserved_resources.remote(requester), timeout=5)
    return granted
