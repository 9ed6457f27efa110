"""What is computed again draws the random numbers it drew, on the device it is on, and keeps only what it is given."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lumen_ray import recompute
from lumen_ray.recompute import recomputed

CPU = torch.device("cpu")


@dataclass
class Held:
    """torch does not look into it for tensors."""

    values: Tensor


def noisy(held: Held, *, by: Tensor) -> Tensor:
    return nn.functional.dropout(held.values * by, 0.5) ** 2


def gradient(run) -> Tensor:
    by = torch.ones(64, requires_grad=True)
    torch.manual_seed(1)
    run(noisy, CPU, Held(torch.ones(64)), by=by).sum().backward()
    return by.grad


def test_random_numbers_are_those_of_the_first_time():
    assert torch.equal(gradient(recomputed), gradient(lambda run, device, *args, **named: run(*args, **named)))


def test_torch_is_told_the_device(monkeypatch):
    """It saves a GPU's generator for tensors among the arguments alone, whatever is in dataclasses and keywords."""
    seen = []

    def checkpoint(run, *args, use_reentrant, **named):
        seen.extend(arg.device for arg in args if isinstance(arg, Tensor))
        return run(*args, **named)

    monkeypatch.setattr(recompute, "checkpoint", checkpoint)
    for device in (CPU, torch.device("meta")):
        recomputed(noisy, device, Held(torch.ones(3)), by=torch.ones(3))
    assert seen == [CPU, torch.device("meta")]


def test_without_gradients_nothing_is_kept_or_done_twice(monkeypatch):
    monkeypatch.setattr(recompute, "checkpoint", None)
    with torch.no_grad():
        assert recomputed(noisy, CPU, Held(torch.ones(3)), by=torch.ones(3)).shape == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu():
    device, found = torch.device("cuda"), []
    for run in (recomputed, lambda run, device, *args, **named: run(*args, **named)):
        by = torch.ones(64, requires_grad=True, device=device)
        torch.manual_seed(1)
        run(noisy, device, Held(torch.ones(64, device=device)), by=by).sum().backward()
        found.append(by.grad)
    assert torch.equal(*found)
