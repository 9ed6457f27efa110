"""Both sides of a comparison learn the same; where they do not, no speed is reported."""

import pytest
import torch

from lumen_ray.bench import variants
from lumen_ray.errors import UserError


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The modules to be compiled, which takes minutes on a CPU; they stay eager."""
    found = []
    monkeypatch.setattr(variants, "compile_module", lambda module, device: found.append(module))
    return found


def test_both_sides_of_every_comparison_are_timed(compiled):
    results = list(variants.bench(names=["lumen", "instruct_pix2pix"], images=1, turns=2, repeats=1))
    assert [r.name for r in results] == [
        f"{how}/{d}" for how in variants.BASELINES for d in ("lumen", "instruct_pix2pix")
    ]
    assert len(compiled) == 2
    for result in results:
        how = result.name.split("/")[0]
        assert list(result.rates) == [how, variants.BASELINES[how]] and len(result.ratios) == 2
        assert result.to_json()["first_step_seconds"].keys() == result.rates.keys()
        apart = result.to_json()["largest_relative_difference_of_a_loss"]
        assert bool(result.equal) == (how == "compiled")  # bf16 is held to nothing
        assert (apart == 0) == (how == "compiled") and apart < 0.1  # nothing was compiled here


def test_a_difference_is_reported_in_place_of_a_speed(monkeypatch):
    def wrong(module, device):
        with torch.no_grad():
            next(module.parameters()).mul_(3)

    monkeypatch.setattr(variants, "compile_module", wrong)
    results = list(variants.bench(names=["lumen"], images=1, turns=1, repeats=1))
    assert [bool(r.failed) for r in results] == [False, True] and results[1].reached is False
    assert "a loss differs by" in results[1].verdict() and not results[1].rates


def test_what_cannot_be_measured_is_reported_before(monkeypatch):
    def missing(device):
        raise UserError("torch.compile needs a C++ compiler")

    with pytest.raises(UserError, match="unknown decoder 'sam'"):
        variants.check("nano-experts", ["sam"])
    monkeypatch.setattr(variants, "check_compiler", missing)
    with pytest.raises(UserError, match="needs a C"):
        variants.check("nano-experts", None)
