"""A run that was interrupted ends like one that was not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.train_fakes import make_job

from lumen_ray.data.batches.feed import local_batches
from lumen_ray.data.batches.plan import Plan
from lumen_ray.train.launch import train_local
from lumen_ray.train.run import checkpoint
from lumen_ray.train.trainer import DivergedError, Trainer


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """More than one, so that sums whose order is left to the threads would show."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run with checkpoints at steps 2, 4 (end of the first stage), 6 and 8."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train_local(make_job(data, run, checkpoint_every=2))
    return run


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_ends_with_the_same_weights(data, whole, tmp_path, step):
    """From the middle of the first stage, from between the stages, and from the middle of the second."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").iterdir():
        if checkpoint.position(path)["step"] > step:
            shutil.rmtree(path)
    train_local(make_job(data, run, checkpoint_every=2))
    ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["step"] for line in lines(run)] == list(range(8))
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]


def test_the_second_stage_trains_the_decoder_only(whole):
    states = {}
    for path in (whole / "checkpoints").iterdir():
        states[checkpoint.position(path)["step"]] = path
    assert sorted(states) == [2, 4, 6, 8]
    trainer_states = [_weights(whole, states[step]) for step in (4, 8)]
    changed = {n for n in trainer_states[0] if not torch.equal(trainer_states[0][n], trainer_states[1][n])}
    assert changed and all(name.startswith("decoders.lumen.") for name in changed)


def _weights(run, path):
    from lumen_ray.model.build import load_model

    model = load_model(run / "model").model
    checkpoint.load_weights(path, model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_batches_of_other_steps_are_refused(data, tmp_path):
    prepared = make_job(data, tmp_path / "run")
    trainer = Trainer(prepared.job, torch.device("cpu"))
    plan = Plan(prepared.manifest, prepared.job.recipe)
    with pytest.raises(RuntimeError, match="batch of step 1 at step 0"):
        trainer.fit(local_batches(prepared.reader, plan, 1))


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    prepared = make_job(data, tmp_path / "run")
    trainer = Trainer(prepared.job, torch.device("cpu"))
    with torch.no_grad():
        next(trainer.model.decoders.parameters()).fill_(float("nan"))
    plan = Plan(prepared.manifest, prepared.job.recipe)
    with pytest.raises(DivergedError, match=r"step 0 \(stage s0\), images scene-.*: loss .*heatmap.* is not finite"):
        trainer.fit(local_batches(prepared.reader, plan))
    assert checkpoint.latest(tmp_path / "run") is None
