"""Both sides give the same results, and the bench notices when they do not."""

import pytest
import torch

from lumen_ray.bench import grounding_dino
from lumen_ray.bench.timing import SidesDiffer


@pytest.fixture(scope="module")
def sides():
    torch.manual_seed(0)
    library = grounding_dino.Library.fresh(grounding_dino.SETTINGS)
    return library, grounding_dino.Ours.like(library, grounding_dino.SETTINGS)


def test_both_sides_are_timed_on_the_same_images(sides):
    result = grounding_dino._speed(*sides, 2, turns=1, repeats=1, threads=1)
    assert list(result.rates) == ["engine", "transformers"]
    assert all(len(rates) == 1 and rates[0] > 0 for rates in result.rates.values())
    assert result.aim == grounding_dino.AIM and result.name == "grounding_dino/batch 2"


def test_both_sides_detect_every_class_in_every_image(sides):
    library, ours = sides
    images = [
        grounding_dino.decode(grounding_dino.scenes.scene_row(0, i, grounding_dino.STORED_SIDE)["image"])
        for i in range(2)
    ]
    for (answer,) in ours.detect(images):
        assert [p.phrase for p in answer.predictions] == list(grounding_dino.WORDS)
    assert len(library.detect(images)) == 2
    ids = library.inputs(images)["input_ids"]
    assert (ids == grounding_dino.SPECIAL["."]).sum() == 2 * len(grounding_dino.WORDS) and not (ids == 100).any()


def test_a_difference_is_refused(sides, monkeypatch):
    library, ours = sides
    monkeypatch.setitem(ours.decoder.bbox_embed.layers[-1]._parameters, "bias", torch.full((4,), 0.01))
    with pytest.raises(SidesDiffer, match="differ by"):
        grounding_dino._speed(library, ours, 1, turns=1, repeats=1, threads=1)
