"""Both sides find the same, the bench sees when they do not, and memory is what was allocated at one time."""

import pytest
import torch

from lumen_ray.bench import decoders


@pytest.fixture(scope="module")
def sides():
    torch.manual_seed(0)
    library = decoders.Library.fresh(decoders.SETTINGS)
    return library, decoders.Ours.like(library, decoders.SETTINGS)


def test_both_sides_are_timed_on_the_same_images(sides):
    result = decoders._speed(*sides, 2, turns=1, repeats=1, threads=1)
    assert list(result.rates) == ["engine", "transformers"]
    assert all(len(rates) == 1 and rates[0] > 0 for rates in result.rates.values())
    assert result.aim == decoders.AIM and result.name == "grounding_dino/batch 2"


def test_both_sides_look_for_every_class_in_every_image(sides):
    library, ours = sides
    images = [decoders.decode(decoders.scenes.scene_row(0, i, decoders.STORED_SIDE)["image"]) for i in range(2)]
    for (answer,) in ours.find(images):
        assert [p.phrase for p in answer.predictions] == list(decoders.WORDS)
    assert len(library.find(images)) == 2
    ids = library.inputs(images)["input_ids"]
    assert (ids == decoders.SPECIAL["."]).sum() == 2 * len(decoders.WORDS) and not (ids == 100).any()


def test_a_difference_is_refused(sides, monkeypatch):
    library, ours = sides
    monkeypatch.setitem(ours.decoder.bbox_embed.layers[-1]._parameters, "bias", torch.full((4,), 0.01))
    with pytest.raises(RuntimeError, match="differ by"):
        decoders._speed(library, ours, 1, turns=1, repeats=1, threads=1)


def test_memory_of_a_training_step_of_each_decoder():
    (lumen,) = [r for r in decoders.training_memory(images=1) if r.name == "memory/lumen"]
    ((used,),) = lumen.rates.values()
    assert 1 < used < 1000 and lumen.reached is None
    assert str(round(used, 1)) in lumen.verdict()
    assert lumen.verdict().endswith("gradients and inputs, and without trunk and optimiser")
    assert lumen.to_json()["note"] in lumen.verdict()


def test_the_peak_is_what_is_held_at_one_time():
    def step():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b.double()

    assert decoders.peak_memory(step) == pytest.approx(12e6, rel=0.01)
