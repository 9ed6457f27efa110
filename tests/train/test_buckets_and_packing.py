"""Runs over size buckets with packed rows: the same samples and weights after a stop, and a model that knows them."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.tiny_models import mixed_shards, tiny_settings
from support.train_fakes import make_recipe

from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.shards.shards import read_manifest
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.train.launch import prepare_job, train_local
from lumen_ray.train.run import checkpoint

BUCKETS = [[64, 64], [48, 64], [64, 48]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    mixed_shards(folder / "shards")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(vocab_size=330).model_dump(mode="json")))
    return folder


def make_job(data, run, **changes):
    changes = {"buckets": BUCKETS, "pack_tokens": 120, "batch_size": 6, "checkpoint_every": 3} | changes
    return prepare_job(data / "shards", make_recipe(data, stages=((9, None),), **changes), run)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_with_the_same_weights(data, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_local(make_job(data, whole))
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").iterdir():
        if checkpoint.position(path)["step"] > 3:
            shutil.rmtree(path)
    train_local(make_job(data, run))
    ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (run, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]
    engine = Engine.load(whole / "model")
    assert engine.trunk.buckets == tuple(map(tuple, BUCKETS))


def test_a_model_knows_the_sizes_it_was_trained_at_and_no_others(data, tmp_path):
    """Of each shape there are too few to fill a batch, so all are seen at one size, and later too."""
    assert make_job(data, tmp_path / "all").job.meta.buckets == BUCKETS
    job = make_job(data, tmp_path / "some", batch_size=20).job
    seen = {Plan(read_manifest(data / "shards"), job.recipe)[step].bucket for step in range(9)}
    assert job.meta.buckets == [list(bucket) for bucket in seen] == [[48, 64]]
    assert make_job(data, tmp_path / "one", buckets=BUCKETS[:1], batch_size=20).job.meta.buckets == BUCKETS[:1]


def test_two_ranks_train_what_one_does(data, tmp_path):
    """Though their rows differ in number and length, and a step may give a rank pictures or texts alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    buckets = [[64, 64], [48, 96]]  # texts share a batch with pictures, since they fill none of their own
    train_local(make_job(data, one, buckets=buckets, batch_size=20))
    assert run_ranks(make_job(data, two, buckets=buckets, batch_size=20)) == [0, 0]
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_packing_changes_padding_and_not_the_losses(data, tmp_path):
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    train_local(make_job(data, packed, pack_tokens=400))
    train_local(make_job(data, plain, pack_tokens=0))
    for ours, theirs in zip(lines(packed), lines(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert sum(line["padding"] for line in lines(packed)) < 0.5 * sum(line["padding"] for line in lines(plain))


def test_what_was_cut_off_is_in_the_log(data, tmp_path):
    train_local(make_job(data, tmp_path / "run", pack_tokens=80))  # texts have up to a hundred tokens
    assert any(line.get("truncated_tokens", 0) > 0 for line in lines(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_tokens": 60}, "pack_tokens 60 leaves no room .* 64x64 pixels; give at least 80"),
        ({"buckets": [[64, 72]]}, r"bucket \[64, 72\] does not fit the grid of model 'tiny'"),
    ],
)
def test_what_the_model_cannot_take_is_reported_before_the_run(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_job(data, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
