"""W&B hears of a run that asks for it, also of one that is resumed, and is not needed for others."""

import builtins
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.train_fakes import cut_after, job_of, log_of

from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import train_local
from lumen_ray.train.metrics import wandb as tracker

STAGE = {"steps": 4, "groups": [{"tasks": ["caption"]}]}
RECIPE = Recipe.model_validate({"name": "r", "stages": [{"name": "s"} | STAGE], "wandb": {"project": "cells"}})


class FakeWandb(ModuleType):
    """The client, which keeps what it is sent by the id of the run; a later client goes on behind it."""

    def __init__(self):
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=ConnectionError)
        self.Settings = lambda **settings: settings
        self.started, self.finished, self.sent, self.refuses = [], 0, {}, ""

    def init(self, **options):
        if self.refuses:
            raise self.errors.Error(self.refuses)
        self.started.append(options)
        sent = self.sent.setdefault(options["id"], {})
        run = SimpleNamespace(step=max(sent, default=-1) + 1, finish=self._finish)
        run.log = lambda numbers, step: sent.__setitem__(step, numbers)
        return run

    def _finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_missing_package_is_reported_before_the_start(data, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'lumen-ray\[wandb\]'") as error:
        job_of(data, tmp_path / "run", STAGE, wandb={"project": "cells"})
    assert error.value.reason == "missing_package"
    monkeypatch.setenv("WANDB_PROJECT", "cells")
    with pytest.raises(UserError, match="leave out --wandb, WANDB_PROJECT"):
        job_of(data, tmp_path / "run", STAGE)


def test_nothing_is_sent_without_being_asked(data, tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a key alone asks for nothing")
    train_local(job_of(data, tmp_path / "run", STAGE))
    assert fake.started == [] and not (tmp_path / "run" / "wandb.json").exists()


def test_metrics_go_to_one_run_over_restarts(data, tmp_path, fake):
    run = tmp_path / "run"
    for _ in range(2):
        train_local(job_of(data, run, STAGE, checkpoint_every=2, wandb={"project": "cells", "entity": "team"}))
        if (run / "model").exists() and fake.finished == 1:
            cut_after(run, 2)
    ((run_id, sent),) = fake.sent.items()
    assert json.loads((run / "wandb.json").read_text()) == {"run_id": run_id} and fake.finished == 2
    assert {step: values["loss"] for step, values in sent.items()} == {n["step"]: n["loss"] for n in log_of(run)}
    assert {"loss/lm", "lr", "samples_per_s", "task_loss/caption"} <= sent[3].keys()
    first, second = fake.started
    assert first["project"] == "cells" and first["entity"] == "team" and first["name"] == "run"
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["config"]["batch_size"] == 8
    assert first["settings"] == {"console": "off", "save_code": False, "silent": True, "disable_git": True}
    assert tracker.os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_a_repeated_step_is_not_sent_again(tmp_path, fake):
    log = tracker.WandbTracker(tmp_path, RECIPE, RECIPE.wandb)
    log.write(0, {"loss": 1.0})
    log._run.step = 1
    log.write(0, {"loss": 2.0})
    log.write(1, {"loss": 3.0})
    assert list(fake.sent.values()) == [{0: {"loss": 1.0}, 1: {"loss": 3.0}}]


def test_a_client_that_cannot_start_is_reported(data, tmp_path, fake):
    fake.refuses = "No API key configured.\nmore"
    with pytest.raises(UserError, match="Weights & Biases cannot be used: No API key configured.; set WANDB") as error:
        train_local(job_of(data, tmp_path / "run", STAGE, wandb={"project": "cells"}))
    assert error.value.reason == "wandb" and "\n" not in str(error.value)


def test_the_real_client_writes_a_folder_without_a_server(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb (pip install 'lumen-ray[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train_local(job_of(data, run, STAGE, wandb={"project": "cells"}))
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert b"task_loss/caption" in file.read_bytes()
