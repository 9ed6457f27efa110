"""Both sides find the same, and the bench sees when they do not."""

import pytest
import torch

from lumen_ray.bench import decoders
from lumen_ray.bench.timing import SidesDiffer


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
    with pytest.raises(SidesDiffer, match="differ by"):
        decoders._speed(library, ours, 1, turns=1, repeats=1, threads=1)
