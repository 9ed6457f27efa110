"""Memory of a training step is what was allocated at one time, in the sizes of the preset."""

import pytest
import torch

from lumen_ray.bench import memory
from lumen_ray.bench.training_step import read_preset
from lumen_ray.errors import UserError


def test_every_decoder_of_a_preset_is_measured():
    results = list(memory.bench(images=1))
    assert [r.name for r in results] == [f"memory/{name}" for name in read_preset("nano-experts", None)[1]]
    assert len(results) == 5
    for result in results:
        ((used,),) = result.rates.values()
        assert 1 < used < 1000 and result.reached is None
        assert str(round(used, 1)) in result.verdict() and result.to_json()["note"] in result.verdict()


def test_activation_checkpointing_takes_less():
    (kept,), (again,) = (memory.bench(names=["unipose"], images=2, checkpointed=on) for on in (False, True))
    assert again.rates["a training step"][0] < 0.8 * kept.rates["a training step"][0]
    assert again.details["activation_checkpointing"] and not kept.details["activation_checkpointing"]


def test_a_decoder_that_the_preset_lacks_is_reported():
    with pytest.raises(UserError, match="unknown decoder 'sam'.*grounding_dino"):
        read_preset("nano-experts", ["sam"])
    with pytest.raises(UserError, match="unknown decoder 'unipose'"):
        read_preset("nano", ["unipose"])


def test_the_peak_is_what_is_held_at_one_time():
    def step():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b.double()

    assert memory.peak_memory(step) == pytest.approx(12e6, rel=0.01)
