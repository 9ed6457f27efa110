"""The chosen device, or the default."""

import pytest

from lumen_ray.errors import UserError
from lumen_ray.inference.device import find_device


def gpus(monkeypatch, count):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_a_gpu_is_used_where_torch_sees_one(monkeypatch):
    gpus(monkeypatch, 2)
    assert [find_device(name) for name in (None, "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    gpus(monkeypatch, 0)
    assert find_device() == find_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("count", "name", "words"),
    [
        (0, "cuda", "device 'cuda' is not available: torch finds 0 GPUs; devices: cpu$"),
        (2, "cuda:2", "device 'cuda:2' is not available: torch finds 2 GPUs; devices: cpu, cuda, cuda:0, cuda:1$"),
        (2, "gpu", "unknown device 'gpu'; devices: cpu, cuda, cuda:N"),
        (2, "cuda:-1", "unknown device"),
    ],
)
def test_another_is_refused_in_a_sentence(monkeypatch, count, name, words):
    gpus(monkeypatch, count)
    with pytest.raises(UserError, match=words):
        find_device(name)
