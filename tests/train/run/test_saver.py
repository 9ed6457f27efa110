"""Checkpoints that are written while training goes on."""

import threading

import pytest
import torch
from support.train_fakes import log_of, make_job

from lumen_ray.data.files import StoreError
from lumen_ray.errors import UserError
from lumen_ray.model.build import build_model
from lumen_ray.train.launch import train_local
from lumen_ray.train.run import checkpoint, saver
from lumen_ray.train.trainer import Trainer

#: checkpoints after steps 2 and 4
OPTIONS = {"stages": ((4, None),), "checkpoint_every": 2}


def weights(job, path):
    model = build_model(job.start.settings, len(job.start.tokenizer))
    checkpoint.load_weights(path, model)
    return model.state_dict()


def test_a_save_in_flight_holds_what_its_step_left_and_steps_go_on(data, tmp_path, monkeypatch):
    went_on, save, step = threading.Event(), checkpoint.save, Trainer._step

    def slow(*args):
        assert went_on.wait(60)
        return save(*args)

    def following(self, *args):
        values = step(self, *args)
        if self.step == 3:  # the last one; the save after it waits for the one of step 2
            went_on.set()
        return values

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(Trainer, "_step", following)
    train_local(make_job(data, tmp_path / "run", **OPTIONS))
    monkeypatch.undo()
    train_local(whole := make_job(data, tmp_path / "waits", **OPTIONS, async_checkpoints=False))
    ours, theirs = (checkpoint.complete(tmp_path / name) for name in ("run", "waits"))
    assert [checkpoint.position(path)["step"] for path in ours] == [2, 4]
    for one, other in zip(ours, theirs, strict=True):
        expected = weights(whole.job, other)
        assert all(torch.equal(value, expected[name]) for name, value in weights(whole.job, one).items())


@pytest.mark.parametrize("in_background", [True, False])
def test_a_bucket_that_is_away_for_a_moment_is_tried_again(data, tmp_path, monkeypatch, in_background):
    failures, save = [StoreError("away", "store_unreachable")] * 2, checkpoint.save
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(checkpoint, "save", lambda *args: fail(failures.pop()) if failures else save(*args))
    job = make_job(data, tmp_path / "run", **OPTIONS, checkpoint_retries=2, async_checkpoints=in_background)
    with pytest.warns(UserWarning, match="saving step 2 is tried again in 0.0[12] s: away"):
        train_local(job)
    assert not failures and len(checkpoint.complete(tmp_path / "run")) == 2


def fail(error):
    raise error


def test_a_bucket_that_stays_away_ends_the_run_at_the_next_save(data, tmp_path, monkeypatch):
    job = make_job(data, tmp_path / "run", **OPTIONS, checkpoint_retries=0)
    monkeypatch.setattr(checkpoint, "save", lambda *_: fail(StoreError("away", "store_unreachable")))
    with pytest.raises(UserError, match="away") as error:
        train_local(job)
    assert error.value.reason == "store_unreachable"
    assert [line["step"] for line in log_of(tmp_path / "run")] == [0, 1, 2, 3]
    assert not (tmp_path / "run" / "model").exists()
