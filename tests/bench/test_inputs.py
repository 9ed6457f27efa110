"""When the input bench starts and stops its clock, on schedules whose true rate is known."""

import heapq
from types import SimpleNamespace

import pytest

from lumen_ray.bench import inputs
from lumen_ray.bench.inputs import Arrival
from lumen_ray.data.batches.feed import STEPS_PER_BLOCK
from lumen_ray.errors import UserError

IMAGES = 8


def schedule(steps: int, workers: int, block: int, late: float = 0.0) -> list[Arrival]:
    """Arrivals where a process makes a batch a second, `block` consecutive ones a task, and hands them on in order.

    A task goes to the process that is free first; the last process starts `late` seconds after the others.
    """
    free = [0.0] * (workers - 1) + [late]
    heapq.heapify(free)
    seen, arrived = [], 0.0
    for _ in range(steps // block):
        began = heapq.heappop(free)
        for number in range(block):
            made = began + number + 1
            arrived = max(arrived, made)
            seen.append(Arrival(made, arrived, IMAGES))
        heapq.heappush(free, began + block)
    return seen


@pytest.mark.parametrize("late", [0.0, 5.5, 20.0])
@pytest.mark.parametrize("block", [1, STEPS_PER_BLOCK])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_rate_is_that_of_the_readers_however_they_share_the_plan(workers, block, late):
    margin = inputs.round_steps(workers)
    seen = schedule(inputs.ROUNDS * margin, workers, block, late if workers > 1 else 0.0)
    assert inputs.samples_per_s(seen, margin) == pytest.approx(workers * IMAGES, rel=0.02)


def test_a_clock_within_a_round_would_count_what_lay_ready():
    seen = schedule(inputs.ROUNDS * 32, 2, STEPS_PER_BLOCK)
    assert inputs.ready(seen, STEPS_PER_BLOCK - 1) == STEPS_PER_BLOCK * IMAGES
    assert inputs.ready(seen, inputs.round_steps(2) - 1) == 0


def test_what_lay_ready_is_not_counted():
    """All but the last batch were made before the clock started at the first."""
    seen = [Arrival(1.0, 2.0, 8), Arrival(1.5, 3.0, 8), Arrival(1.6, 4.0, 8), Arrival(6.0, 6.0, 8)]
    assert inputs.samples_per_s(seen, 1) == pytest.approx((16 - 16) / 2)


def test_arrivals_are_stamped_as_they_come(monkeypatch):
    clock = iter([5.0, 9.0])
    monkeypatch.setattr(inputs.time, "time", lambda: next(clock))
    batches = [SimpleNamespace(made=4.0, image_ids=["a", "b"]), SimpleNamespace(made=8.0, image_ids=["c"])]
    assert inputs.arrivals(batches) == [Arrival(4.0, 5.0, 2), Arrival(8.0, 9.0, 1)]


@pytest.mark.parametrize(("steps", "workers"), [(32, 1), (50, 1), (80, 2), (64, 2)])
def test_steps_that_are_no_whole_rounds_are_refused(steps, workers):
    with pytest.raises(UserError, match=rf"--steps {steps} .* multiple of {16 * workers}, such as") as caught:
        inputs.check(steps=steps, workers=workers)
    near = int(str(caught.value).rsplit(" ", 1)[1])
    inputs.check(steps=near, workers=workers)
