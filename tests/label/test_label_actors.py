"""The resources that model actors reserve, and their devices."""

import pytest
from support.label_fakes import FakeEngine

from lumen_ray.errors import UserError
from lumen_ray.label.workers import Labeller, WorkerSettings, actor_resources

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
    settings, asked = actor_resources(WorkerSettings(FakeEngine, (), device, num_actors=2), available)
    assert (asked, settings.device) == (resources, told)


@pytest.mark.parametrize(
    ("device", "available", "words"),
    [
        (None, {"CPU": 8, "GPU": 1}, "num_actors 2 needs 2 GPUs but the Ray cluster has 1; give at most 1 or device"),
        ("cuda", {"CPU": 8}, "num_actors 2 needs 2 GPUs but the Ray cluster has 0; give device 'cpu'"),
        ("cpu", {"CPU": 2, "GPU": 4}, "num_actors 2 needs 3 CPUs but the Ray cluster has 2; give at most 1"),
    ],
)
def test_actors_that_do_not_fit_are_refused(device, available, words):
    with pytest.raises(UserError, match=words):
        actor_resources(WorkerSettings(FakeEngine, (), device, num_actors=2), available)


def test_an_actor_whose_torch_sees_no_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    labeller = Labeller(WorkerSettings("nano", (), "cuda"))
    assert labeller.fault.startswith("device 'cuda' is not available")
    assert not Labeller(WorkerSettings("nano", ())).fault
