"""What a run waits for is reported, once and in one line; a start that takes its time is not."""

import threading

import pytest

from lumen_ray.ray_env import prepare_environment
from lumen_ray.train.run import capacity as capacity_module
from lumen_ray.train.run.capacity import (
    REPORT_AFTER_S,
    RESERVED_S,
    Capacity,
    CapacityWatcher,
    Demand,
    find_shortage,
    waits_for_resources,
)
from lumen_ray.train.run.resources import of_worker

TWO = Demand(2, of_worker(use_gpu=False))
ONE = Demand(1, of_worker(use_gpu=False))
GPUS = Demand(2, of_worker(use_gpu=True))
IDLE = Capacity({"a": {"CPU": 2.0}}, {"a": {"CPU": 2.0}})
USED = Capacity({"a": {"CPU": 2.0}}, {"a": {"CPU": 0.5}})


@pytest.mark.parametrize(
    ("demand", "capacity"),
    [
        (TWO, IDLE),
        (TWO, Capacity({"a": {"CPU": 1}, "b": {"CPU": 1}}, {"a": {"CPU": 0.75}, "b": {"CPU": 1}})),
        (ONE, Capacity(IDLE.total, IDLE.free, {"a": {"CPU": 0.75}})),
        (GPUS, Capacity({}, {"a": {"CPU": 4, "GPU": 2}})),
    ],
)
def test_where_there_is_room_nothing_is_reported(demand, capacity):
    assert find_shortage(demand, capacity) is None


@pytest.mark.parametrize(
    ("demand", "capacity", "words"),
    [
        (
            TWO,
            USED,
            ["for 2 workers with 0.75 CPU each", "has 0.5 of 2 CPU free", "when other jobs free resources"],
        ),
        (ONE, Capacity({"a": {"CPU": 1}}, {}), ["for a worker with 0.75 CPU:", "has 0 of 1 CPU free"]),
        # enough in all, but on no node enough for a worker
        (
            ONE,
            Capacity({"a": {"CPU": 1}, "b": {"CPU": 1}}, {"a": {"CPU": 0.5}, "b": {"CPU": 0.5}}),
            ["1 of 2 CPU free"],
        ),
        (
            GPUS,
            Capacity({"a": {"CPU": 4, "GPU": 2}}, {"a": {"CPU": 4, "GPU": 1}}),
            ["for 2 workers with 0.75 CPU and 1 GPU each", "has 4 of 4 CPU and 1 of 2 GPU free"],
        ),
        (ONE, Capacity(IDLE.total, IDLE.free, {}), ["for a worker with 0.75 CPU:", "a killed run", "for 3:20 at most"]),
        (TWO, Capacity(IDLE.total, IDLE.free, {"a": {"CPU": 0.75}}), ["a killed run"]),
        (TWO, Capacity(USED.total, USED.free, {}), ["has 0.5 of 2 CPU free"]),  # nor would an expired request help
    ],
)
def test_what_is_missing_is_reported_in_one_line(demand, capacity, words):
    sentence = find_shortage(demand, capacity).sentence
    assert sentence.startswith("waiting for resources") and "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("controller", "workers", "wants"),
    [
        (None, [], False),
        ("PENDING_CREATION", [], False),  # it has requested nothing yet
        ("ALIVE", [], True),
        ("ALIVE", ["PENDING_CREATION"] * 2, False),  # the resources are theirs
        ("ALIVE", ["ALIVE", "PENDING_CREATION"], False),
        ("ALIVE", ["ALIVE"] * 2, False),
        ("ALIVE", ["DEAD"] * 2, True),  # and are to be started again
        ("ALIVE", ["DEAD", "ALIVE"], False),
        ("DEAD", ["DEAD"] * 2, False),
    ],
)
def test_capacity_is_needed_until_workers_are_made(controller, workers, wants):
    states = [("SynchronizationActor", "ALIVE"), *(("RayTrainWorker", state) for state in workers)]
    if controller:
        states.append(("TrainController", controller))
    assert waits_for_resources([{"ActorClassName": name, "State": state} for name, state in states]) is wants


class Cluster:
    """A cluster that a test fills and empties, as a watcher of a run of two workers sees it."""

    def __init__(self):
        self.capacity, self.reported = None, []
        self.watcher = CapacityWatcher(TWO, lambda: self.capacity, self.reported.append)

    def stays(self, capacity, start, seconds):
        """The cluster is like this from second `start` on, for some seconds."""
        self.capacity = capacity
        for second in range(seconds):
            self.watcher.check(float(start + second))


@pytest.mark.parametrize("quiet", [None, IDLE])
def test_only_a_wait_of_some_seconds_is_reported_and_only_once(quiet):
    cluster, wait = Cluster(), int(REPORT_AFTER_S)
    cluster.stays(quiet, 0, 3 * wait)
    cluster.stays(USED, 100, wait)
    assert cluster.reported == []
    cluster.stays(USED, 100 + wait, 10 * wait)
    assert len(cluster.reported) == 1


def test_the_next_wait_is_reported_again():
    cluster, wait = Cluster(), int(REPORT_AFTER_S) + 1
    cluster.stays(USED, 0, wait)
    cluster.stays(None, 100, 1)  # the workers are there, and then one of them is lost
    cluster.stays(USED, 200, wait)
    assert len(cluster.reported) == 2 and cluster.reported[0] == cluster.reported[1]


def test_another_reason_is_reported_once_it_has_lasted():
    """The driver's workers die some seconds after it, and then Ray still keeps their CPUs."""
    cluster, wait = Cluster(), int(REPORT_AFTER_S)
    cluster.stays(USED, 0, wait - 1)
    cluster.stays(Capacity(IDLE.total, IDLE.free, {}), wait - 1, wait)
    assert cluster.reported == []
    cluster.watcher.check(3.0 * wait)
    assert len(cluster.reported) == 1 and "a killed run" in cluster.reported[0]


def test_it_watches_beside_the_run_also_after_the_cluster_did_not_answer(monkeypatch):
    monkeypatch.setattr(capacity_module, "EVERY_S", 0.001)
    monkeypatch.setattr(capacity_module, "REPORT_AFTER_S", 0.0)
    capacities, heard = iter([ConnectionError(), USED]), threading.Event()

    def read_capacity():
        capacity = next(capacities, USED)
        if isinstance(capacity, Exception):
            raise capacity
        return capacity

    with CapacityWatcher(TWO, read_capacity, lambda sentence: heard.set()) as watcher:
        assert heard.wait(10)
    assert not watcher._thread.is_alive()


def test_ray_reserves_resources_of_a_killed_run_no_longer_than_reported():
    """Ray's own coordinator, with a clock and a cluster of the test's."""
    prepare_environment()
    from ray.data._internal.cluster_autoscaler import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinators
    from ray.train.v2._internal.execution.scaling_policy import AUTOSCALING_REQUESTS_EXPIRE_TIME_S

    now, node = [0.0], {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}
    coordinator = coordinators._AutoscalingCoordinatorActor(lambda: now[0], lambda *_, **__: None, lambda: [node])

    def asks(run):
        workers, high = [of_worker(use_gpu=False)] * 2, ResourceRequestPriority.HIGH
        coordinator.request_resources(f"train-{run}", workers, AUTOSCALING_REQUESTS_EXPIRE_TIME_S, priority=high)

    asks("killed")
    reasons = []
    for second in range(10, int(RESERVED_S) + 1, coordinator.TICK_INTERVAL_S):
        now[0] = float(second)
        coordinator._tick()
        asks("next")
        found = find_shortage(ONE, Capacity(IDLE.total, IDLE.free, coordinator.get_reserved_resources("train-next")))
        reasons.append(found and found.reason)
    assert reasons == ["reserved"] * 9 + [None]
    assert RESERVED_S == AUTOSCALING_REQUESTS_EXPIRE_TIME_S + coordinator.TICK_INTERVAL_S
