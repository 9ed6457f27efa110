"""The resources that model actors reserve, and their devices."""

from types import SimpleNamespace

import pytest
from support.label_fakes import FakeEngine

from lumen_ray.errors import UserError
from lumen_ray.label.pipeline import label
from lumen_ray.label.plan import Plan
from lumen_ray.label.runs import Pool, Work, actor_resources, default_actors, for_tasks
from lumen_ray.label.workers import Labeller, WorkerSettings

GPU, CPU = (0, 1), (1, 0)  # (CPUs, GPUs)


@pytest.mark.parametrize(
    ("device", "available", "resources", "told"),
    [
        (None, {"CPU": 8, "GPU": 2}, GPU, None),
        ("cuda", {"CPU": 8, "GPU": 2}, GPU, "cuda"),
        ("cpu", {"CPU": 8, "GPU": 2}, CPU, "cpu"),
        (None, {"CPU": 8, "GPU": 0}, CPU, "cpu"),  # Ray hides no GPU from an actor that asks for none
        (None, {"CPU": 8}, CPU, "cpu"),
    ],
)
def test_an_actor_reserves_the_gpu_it_uses(device, available, resources, told):
    settings, asked = actor_resources(WorkerSettings(FakeEngine, (), device), range(2, 3), available)
    assert (asked, settings.device) == (resources, told)


@pytest.mark.parametrize(
    ("device", "available", "words"),
    [
        (
            None,
            {"CPU": 8, "GPU": 1},
            "2 actors are too many: the GPUs of the Ray cluster have room for 1; give at most 1 or device",
        ),
        (
            "cuda",
            {"CPU": 8},
            "2 actors are too many: the GPUs of the Ray cluster have room for 0; give device 'cpu'",
        ),
        (
            "cpu",
            {"CPU": 1, "GPU": 4},
            "2 actors are too many: the CPUs of the Ray cluster have room for 1; give at most 1",
        ),
    ],
)
def test_actors_that_do_not_fit_are_refused(device, available, words):
    with pytest.raises(UserError, match=words):
        actor_resources(WorkerSettings(FakeEngine, (), device), range(2, 9), available)


def test_an_actor_whose_torch_sees_no_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    labeller = Labeller(WorkerSettings("nano", (), "cuda"))
    assert labeller.fault.startswith("device 'cuda' is not available")
    assert not Labeller(WorkerSettings("nano", ())).fault


@pytest.mark.parametrize(
    ("cores", "available", "images", "is_all", "pool"),
    [
        (4, {"CPU": 6}, 10_000, True, range(4, 5)),  # logical CPUs of a local Ray are not cores
        (4, {"CPU": 6}, 100, True, range(2, 3)),  # loading the model takes longer than 64 images
        (4, {"CPU": 6}, 1, True, range(1, 2)),
        (4, {"CPU": 6}, 100, False, range(4, 5)),  # more are being listed
        (64, {"CPU": 64}, 10_000, True, range(8, 9)),
        (64, {"CPU": 64, "GPU": 2}, 10_000, True, range(2, 3)),
        (None, {"CPU": 96, "GPU": 16}, 10_000, False, range(1, 17)),  # a cluster's pool grows
    ],
)
def test_by_default_there_is_an_actor_for_each_gpu_or_core(monkeypatch, cores, available, images, is_all, pool):
    monkeypatch.setattr("lumen_ray.label.runs._local_cores", lambda: cores)
    assert default_actors(None, available, images, is_all) == pool
    if "GPU" in available:
        assert default_actors("cpu", available, images, is_all)[-1] == 8


def test_actors_share_the_cores(monkeypatch):
    monkeypatch.setattr("lumen_ray.label.runs._local_cores", lambda: 8)
    settings = WorkerSettings(FakeEngine, ())
    assert actor_resources(settings, range(2, 3), {"CPU": 8})[0].threads == 4
    assert actor_resources(settings, range(1, 9), {"CPU": 8})[0].threads == 1
    assert actor_resources(settings, range(1, 2), {"CPU": 8, "GPU": 1})[0].threads == 8  # to decode
    monkeypatch.setattr("lumen_ray.label.runs._local_cores", lambda: None)
    assert actor_resources(settings, range(4, 5), {"CPU": 64})[0].threads == 1  # one CPU is reserved for each


def test_several_actors_share_a_gpu(monkeypatch):
    """Ray hands out shares of a GPU, and no actor is split over two."""
    asked = {}

    class Stop(Exception):
        pass

    def pool(device, available, images, is_all):
        asked.update(available)
        raise Stop

    monkeypatch.setattr("lumen_ray.label.runs.default_actors", pool)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for share, fit in ((1, 3), (0.5, 6), (0.4, 6), (0.3, 9), (0.1, 30)):
        monkeypatch.setattr("lumen_ray.ray_env.cluster_resources", lambda: {"CPU": 8.0, "GPU": 3.0})
        with pytest.raises(Stop):
            next(Pool(gpus_per_actor=share).run(Work(Plan("/nowhere"), (), None), WorkerSettings(FakeEngine, ())))
        assert asked["GPU"] == fit


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_a_share_of_no_gpu_or_of_several_is_refused(tmp_path, share):
    with pytest.raises(UserError, match="give a share of a GPU from 0.01 to 1"):
        label(FakeEngine, tmp_path, tmp_path / "out", tasks=["detect"], classes=["a"], gpus_per_actor=share)


@pytest.mark.parametrize(
    ("asked", "fragments", "is_listed", "pool"),
    [
        (range(2, 3), 1, True, range(1, 2)),
        (range(2, 3), 5, True, range(2, 3)),
        (range(1, 33), 3, True, range(1, 4)),
        (range(2, 3), 1, False, range(2, 3)),
    ],
)
def test_no_more_actors_than_tasks(asked, fragments, is_listed, pool):
    plan = SimpleNamespace(fragments=lambda listing: (SimpleNamespace(index=k) for k in range(fragments + 1)))
    work = Work(plan, {0}, None if is_listed else "a listing")
    assert for_tasks(asked, work) == pool
