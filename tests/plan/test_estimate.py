"""The simulated pipeline: throughputs known beforehand, the bottleneck by name, and long jobs beside whole ones."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plan_fakes import times

from lumen_ray.label.runs import task_size
from lumen_ray.plan import estimate as module
from lumen_ray.plan.estimate import availability, estimate, window
from lumen_ray.plan.pipeline import FRAGMENT, Cluster, Pipeline

MODEL = {"model": 0.8}  # 10 images per second and actor
EIGHT = Cluster(actors=8, cores=96, actors_per_node=8, threads=4)


@pytest.mark.parametrize(
    ("cluster", "stages", "size", "rate"),
    [
        (EIGHT, MODEL, 1, 80),
        (EIGHT, MODEL, 64, 80),
        (EIGHT, {"model": (0.4, 1.2)}, 16, 80),  # as fast as the mean
        (replace(EIGHT, cores=4), MODEL, 16, 40),  # a core launches the kernels of one GPU
        (EIGHT, MODEL | {"driver": 1.0}, 1, 32),  # a task of 32 images per second
        (EIGHT, MODEL | {"driver": 1.0}, 64, 80),
        (EIGHT, MODEL | {"listing": 0.05}, 16, 20),
        (replace(EIGHT, storage=15e6), MODEL, 16, 15),  # images of 1 MB
        (replace(EIGHT, link=2e6), MODEL, 16, 16),
        (EIGHT, MODEL | {"reading": 0.5, "read_at_once": 1}, 64, 16),
        (EIGHT, MODEL | {"reading": 0.5, "read_at_once": 8}, 64, 80),
        (EIGHT, MODEL | {"decoding": 0.8}, 64, 40),  # 4 threads each
        (replace(EIGHT, threads=1), MODEL | {"decoding": 0.4}, 64, 20),
        (EIGHT, MODEL | {"publishing": 3.0}, 64, 80),  # an actor publishes beside the model
        (EIGHT, MODEL | {"publishing": 6.4}, 64, 40),
        (EIGHT, MODEL | {"request_s": 3.2}, 64, 37.6),  # two requests per fragment, and one of eight at once before
    ],
)
def test_throughput(cluster, stages, size, rate):
    assert window(cluster, times(**stages), 1e6, size).images_per_second == pytest.approx(rate, rel=0.03)


def test_the_first_batch_of_every_task_is_waited_for():
    slow = times(model=0.8, reading=0.05)  # 0.4 s for a batch, 3.6 s in place of 3.2 s for a fragment
    assert window(EIGHT, slow, 1e6, 1).images_per_second == pytest.approx(80 * 3.2 / 3.6, rel=0.02)
    assert window(EIGHT, slow, 1e6, 64).images_per_second == pytest.approx(80, rel=0.01)


@pytest.mark.parametrize(
    ("cluster", "stages", "name"),
    [
        (EIGHT, {}, "model"),
        (EIGHT, {"listing": 0.05}, "listing"),
        (EIGHT, {"driver": 2.0}, "driver"),
        (EIGHT, {"decoding": 0.8}, "decoding"),
        (replace(EIGHT, storage=15e6), {}, "reading"),
        (EIGHT, {"reading": 0.5}, "reading"),
        (EIGHT, {"publishing": 8.0}, "publishing"),
        (EIGHT, {"start": 3000.0}, "start"),
        (EIGHT, {"finishing": 100.0}, "finishing"),
    ],
)
def test_the_bottleneck_is_named(cluster, stages, name):
    found = estimate(cluster, times(**MODEL | stages), 20_000, 1e6)
    assert found.bottleneck == name
    if name in found.gains:
        assert found.gains[name] == max(found.gains.values()) > 1.2


def test_a_job_is_simulated_from_its_start_to_its_end():
    found = estimate(EIGHT, times(model=0.8, start=30.0, finishing=0.01, ray_start_s=5.0), 8_000, 1e6)
    assert found.took.is_whole
    assert found.took.start_s == pytest.approx(35)
    assert found.took.label_s == pytest.approx(100, rel=0.1)  # the last tasks do not end together
    assert found.took.finish_s == pytest.approx(2.5)
    assert found.took.seconds == pytest.approx(found.took.start_s + found.took.label_s + found.took.finish_s)


@pytest.mark.parametrize(
    "stages",
    [
        {},
        {"driver": 1.0},  # which slows the first tasks down
        {"reading": 0.05, "decoding": 0.3, "publishing": (0.1, 0.5), "model": (0.2, 1.0)},
    ],
)
def test_parts_of_a_job_say_what_the_whole_says(monkeypatch, stages):
    given, images = times(**MODEL | stages), 150_000
    whole = estimate(EIGHT, given, images, 1e6)
    monkeypatch.setattr(module, "WHOLE", 0)
    parts = estimate(EIGHT, given, images, 1e6)
    assert whole.took.is_whole and not parts.took.is_whole
    assert parts.took.seconds == pytest.approx(whole.took.seconds, rel=0.03)


def test_a_share_of_a_large_cluster_stands_for_it(monkeypatch):
    large = Cluster(actors=32, cores=96, actors_per_node=8, threads=4, storage=200e6)
    for stages in ({}, {"driver": 1.0}, {"listing": 0.01}):
        given = times(**MODEL | stages)
        whole = window(large, given, 1e6, 4)
        with monkeypatch.context() as patch:
            patch.setattr(module, "MOST_ACTORS", 8)
            share = window(large, given, 1e6, 4)
        assert share.images_per_second == pytest.approx(whole.images_per_second, rel=0.05)


def test_every_image_is_labelled_once_however_many_nodes_are_lost():
    cluster = replace(EIGHT, actors_per_node=2, losses_per_hour=200.0, replace_s=20.0)
    pipeline = Pipeline(cluster, times(**MODEL, start=10.0), 1e6, images=9_999, seed=3)
    calm = Pipeline(EIGHT, times(**MODEL, start=10.0), 1e6, images=9_999).run_to_end()
    assert pipeline.run_to_end() > 1.1 * calm
    assert pipeline.images == 9_999


def test_lost_nodes_cost_what_the_long_estimate_says():
    cluster = replace(EIGHT, actors_per_node=2, losses_per_hour=100.0, replace_s=60.0)
    given = times(**MODEL, start=15.0)
    share = availability(cluster, given)
    assert share == pytest.approx(0.645, abs=0.02)
    calm = Pipeline(EIGHT, given, 1e6, images=30_000, is_warm=True).run_to_end()
    lossy = [Pipeline(cluster, given, 1e6, images=30_000, is_warm=True, seed=seed).run_to_end() for seed in range(1, 9)]
    assert calm / (sum(lossy) / len(lossy)) == pytest.approx(share, rel=0.1)


def test_seeds_give_equal_results_and_others_do_not():
    given = times(model=(0.1, 0.5, 2.0))
    one, same, other = (estimate(EIGHT, given, 20_000, 1e6, seed).took.seconds for seed in (0, 0, 1))
    assert one == same != other


def test_a_hundred_million_images_on_64_gpus():
    cluster = Cluster(actors=64, cores=96, actors_per_node=8, threads=4, storage=1e12)
    found = estimate(cluster, times(**MODEL, driver=0.007, listing=1e-4), 100_000_000, 5e5)
    assert found.took.label_s == pytest.approx(100_000_000 / 640, rel=0.03)
    assert found.bottleneck == "model" and not found.took.is_whole


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.tuples(*[st.floats(1e-4, 0.5)] * 6),
    st.sampled_from([1, 4]),
    st.floats(1e6, 1e9),
)
def test_more_gpus_are_never_slower_and_nothing_is_busier_than_it_can_be(actors, more, seconds, threads, storage):
    names = ("reading", "decoding", "model", "publishing", "driver", "listing")
    given = times(**dict(zip(names, seconds, strict=True)))
    rates = []
    for number in (actors, actors + more):
        cluster = Cluster(number, 4.0, threads=threads, storage=storage)
        found = window(cluster, given, 1e5, 2)
        assert all(0 <= share <= 1 for share in found.busy.values())
        assert found.images_per_second <= number * 8 / given.model.mean * 1.05
        rates.append(found.images_per_second)
    assert rates[1] >= rates[0] * 0.95


def test_the_tasks_of_a_job_hold_its_images():
    for images in (1, 31, 32, 33, 5_000, 100_000, 10_000_000):
        number, left = 0, -(-images // FRAGMENT)
        while left > 0 and number < 10_000:
            left, number = left - task_size(number), number + 1
        assert module._tasks(images) == number
