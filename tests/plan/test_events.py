"""The simulation's kernel: what shares a resource takes as long as arithmetic says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen_ray.plan.events import Queue, Shared, Simulation


def ends(capacity, users):
    """When each of `users` (start, work, rate) of a resource ends, and the resource."""
    simulation = Simulation()
    shared = Shared(simulation, capacity)
    found = {}

    def user(number, start, work, rate):
        yield simulation.sleep(start)
        yield shared.use(work, rate, "use")
        found[number] = simulation.now

    for number, each in enumerate(users):
        simulation.start(user(number, *each))
    simulation.run(lambda: False)
    return [found[number] for number in range(len(users))], shared


@pytest.mark.parametrize(
    ("capacity", "users", "wanted"),
    [
        (4, [(0, 2, 1)], [2]),  # no faster than its own rate
        (1, [(0, 1, 1), (0, 1, 1)], [2, 2]),
        (1, [(0, 1, 1), (0, 2, 1)], [2, 3]),
        (1, [(0, 2, 1), (1, 0.5, 1)], [2.5, 2]),
        (2, [(0, 2, 1), (0, 4, 2)], [3, 3]),  # slowed down by one factor
        (4, [(0, 4, 4), (0, 2, 4)], [1.5, 1]),
        (float("inf"), [(0, 6, 3)] * 5, [2] * 5),
    ],
)
def test_users_of_a_resource(capacity, users, wanted):
    assert ends(capacity, users)[0] == pytest.approx(wanted)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.5, 8),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 5), st.floats(0.1, 4)), min_size=1, max_size=12),
)
def test_no_more_is_done_than_the_capacity_allows(capacity, users):
    found, shared = ends(capacity, users)
    work = sum(user[1] for user in users)
    assert shared.done["use"] == pytest.approx(work)
    assert max(found) >= work / capacity - 1e-6  # never faster than the resource
    for end, (start, amount, rate) in zip(found, users, strict=True):
        assert end >= start + amount / min(rate, capacity) - 1e-6  # nor than the user
    # a resource that somebody waits for is not idle: all is done by the time it takes in a row
    assert max(found) <= max(user[0] for user in users) + sum(u[1] / min(u[2], capacity) for u in users) + 1e-6


def test_a_queue_keeps_order_and_bounds_what_waits():
    simulation = Simulation()
    queue, put, taken = Queue(simulation, 2), [], []

    def giver():
        for n in range(5):
            yield queue.put(n)
            put.append((n, simulation.now))

    def taker():
        for _ in range(5):
            yield simulation.sleep(1)
            taken.append((yield queue.take()))

    simulation.start(giver())
    simulation.start(taker())
    simulation.run(lambda: False)
    assert taken == [0, 1, 2, 3, 4]
    assert [when for _, when in put] == [0, 0, 1, 2, 3]


def test_the_end_of_a_process_can_be_waited_for_before_and_after_it():
    simulation, seen = Simulation(), []

    def short():
        yield simulation.sleep(1)

    def waiting(delay, end):
        yield simulation.sleep(delay)
        yield end
        seen.append(simulation.now)

    end = simulation.start(short())
    for delay in (0, 3):
        simulation.start(waiting(delay, end))
    simulation.run(lambda: False)
    assert seen == [1, 3]
