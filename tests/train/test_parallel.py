"""Two FSDP ranks train what one process trains."""

import json

import pytest
import torch
from support.ranks import run_ranks
from support.train_fakes import job_of, weights_of

from lumen_ray.model.build import build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.train.launch import train_local
from lumen_ray.train.run import checkpoint
from lumen_ray.trunk.tokenizer import LumenTokenizer

# At a low rate: Adam's first steps are as large as the rate even where a gradient is nothing but rounding.
STAGES = ({"steps": 12, "lr": 3e-4}, {"steps": 8, "lr": 3e-4, "trainable": ["lumen"]})


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    train_local(job_of(data, folder / "one", *STAGES))
    assert run_ranks(job_of(data, folder / "two", *STAGES)) == [0, 0]
    return folder / "one", folder / "two"


def losses(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name.startswith("loss")} for line in found]


def test_the_loss_curves_are_the_same(runs):
    one, two = map(losses, runs)
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    assert one[0]["loss"] != one[1]["loss"]


def test_the_weights_are_the_same(runs):
    """Measured against how far they moved: Adam turns the rounding of a gradient near zero into a step of its own."""
    one, two = (weights_of(run) for run in runs)
    start = weights_at_start(runs[0])
    assert one.keys() == two.keys() == start.keys()
    apart, moved = (sum(float((a[n] - b[n]).square().sum()) for n in one) ** 0.5 for a, b in ((one, two), (one, start)))
    assert moved > 0.1
    assert apart < 0.01 * moved


def weights_at_start(run):
    """The weights a run started from."""
    start = json.loads((run / "recipe.json").read_text())
    tokenizer = LumenTokenizer.load(run / "tokenizer.json")
    settings = ModelSettings.model_validate(start["model"])
    return build_model(settings, len(tokenizer), start["recipe"]["seed"]).state_dict()


def test_one_process_reads_the_checkpoint_of_two(runs):
    from lumen_ray.model.build import load_model

    model = load_model(runs[0] / "model").model
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load_weights(checkpoint.latest(runs[1]), model)
    saved = weights_of(runs[1])
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
