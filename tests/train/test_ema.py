"""The average of the weights is what it says, is exported by choice, and survives a restart."""

import shutil

import pytest
import torch
from support.tiny_models import tiny_model
from support.train_fakes import cut_after, job_of, on_two_ranks, weights_of

from lumen_ray.recipe import EmaSettings
from lumen_ray.train.ema import Ema
from lumen_ray.train.launch import train_local

STAGES = ({"steps": 4}, {"steps": 4, "trainable": ["lumen"]})
EMA = {"decay": 0.8}


def test_the_average_by_hand():
    model = tiny_model()
    ema = Ema(model, EmaSettings(decay=0.75))
    name, weight = "trunk.vision.projector.weight", model.trunk.vision.projector.weight
    wanted = weight.detach().clone()
    for step in range(40):
        with torch.no_grad():
            weight.add_(1.0)
        ema.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        assert ema.decay(step) == decay
        wanted = decay * wanted + (1 - decay) * weight.detach()
    torch.testing.assert_close(ema.shadow[name], wanted)
    last = weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(weight.detach(), wanted)
    assert torch.equal(weight.detach(), last)
    torch.testing.assert_close(ema.shadow[name], wanted)
    assert not torch.equal(last, wanted)
    assert Ema(model, EmaSettings(decay=0.75, warmup=False)).decay(0) == 0.75


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("ema") / "run"
    train_local(job_of(data, run, *STAGES, ema=EMA, checkpoint_every=2))
    return run


def test_the_export_has_the_average_or_the_last_weights(data, whole, tmp_path):
    last = {}
    for name, options in (("off", {"ema": EMA | {"export": False}}), ("none", {})):
        train_local(job_of(data, tmp_path / name, *STAGES, **options))
        last[name] = weights_of(tmp_path / name)
    average = weights_of(whole)
    assert all(torch.equal(last["off"][n], last["none"][n]) for n in average)
    moved = [n for n in average if not torch.equal(average[n], last["none"][n])]
    assert len(moved) > 50
    frozen = [n for n in average if n.startswith("trunk.")]
    assert all(torch.isfinite(average[n]).all() for n in frozen)


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_resumed_run_ends_with_the_same_bits(data, whole, tmp_path, step):
    """8: killed before the export, which then takes the average from the checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    cut_after(run, step)
    train_local(job_of(data, run, *STAGES, ema=EMA, checkpoint_every=2))
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_on_two_ranks(data, whole, tmp_path):
    on_two_ranks(train_local, job_of(data, tmp_path / "run", *STAGES, ema=EMA, workers=2))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(whole)
    start = tiny_start(data, whole)
    apart, moved = (
        sum(float((a[n] - b[n]).square().sum()) for n in start) ** 0.5 for a, b in ((ours, theirs), (theirs, start))
    )
    assert moved > 0.01 and apart < 0.05 * moved


def tiny_start(data, run):
    from lumen_ray.model.build import build_model

    job = job_of(data, run, *STAGES, ema=EMA, checkpoint_every=2).job
    return build_model(job.start.settings, len(job.start.tokenizer), 0).state_dict()
