"""MLflow hears of a run, also of one that is resumed, and is not needed for one."""

import builtins
from collections import namedtuple
from types import SimpleNamespace

import pytest
from support.train_fakes import cut_after, job_of, log_of

from lumen_ray.errors import UserError
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import train_local
from lumen_ray.train.metrics import mlflow as tracker
from lumen_ray.train.run.saver import Saver

STAGE = {"steps": 4, "groups": [{"tasks": ["caption"]}]}
RECIPE = Recipe.model_validate({"name": "r", "stages": [{"name": "s"} | STAGE], "mlflow": {}})


def test_a_missing_package_is_reported(data, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "mlflow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'lumen-ray\[mlflow\]'"):
        job_of(data, tmp_path / "run", STAGE, mlflow={"tracking_uri": str(tmp_path / "store")})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "store"))
    with pytest.raises(UserError, match="unset MLFLOW_TRACKING_URI"):
        job_of(data, tmp_path / "run", STAGE)


def test_metrics_go_to_one_run_over_restarts(data, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny (pip install 'lumen-ray[mlflow]')")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store, run = (tmp_path / "store").as_uri(), tmp_path / "run"
    options = {"mlflow": {"tracking_uri": store, "experiment": "cells", "every": 3}, "checkpoint_every": 2}
    train_local(job_of(data, run, STAGE, **options))
    cut_after(run, 2)
    train_local(job_of(data, run, STAGE, **options))
    client = mlflow.MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("cells").experiment_id])
    assert len(found) == 1 and found[0].info.status == "FINISHED"
    assert found[0].data.params["batch_size"] == "8"
    history = client.get_metric_history(found[0].info.run_id, "loss/total")
    assert {m.step: m.value for m in history} == {line["step"]: line["loss"] for line in log_of(run)}
    assert {"loss/lm", "lr", "samples_per_s"} <= found[0].data.metrics.keys()


class FakeMlflow:
    """The client's package; it keeps the steps that it is sent metrics of."""

    exceptions = SimpleNamespace(MlflowException=ConnectionError)
    entities = SimpleNamespace(Metric=namedtuple("Metric", "key value timestamp step"))

    def __init__(self):
        self.sent = set()

    def MlflowClient(self, uri):
        run = SimpleNamespace(info=SimpleNamespace(run_id="run"))
        return SimpleNamespace(
            get_experiment_by_name=lambda name: SimpleNamespace(experiment_id="1"),
            create_run=lambda *args, **kwargs: run,
            log_param=lambda *args: None,
            log_batch=lambda run_id, metrics: self.sent.update(metric.step for metric in metrics),
            set_terminated=lambda *args: None,
        )


def test_the_name_of_the_sum_does_not_hang_on_its_parts(tmp_path, monkeypatch):
    """A store of files would not take `loss` in one step and `loss/lm` in another."""
    mlflow, sent = FakeMlflow(), []
    monkeypatch.setattr(tracker, "_mlflow", lambda: mlflow)
    log = tracker.MlflowTracker(tmp_path, RECIPE, RECIPE.mlflow)
    log._client.log_batch = lambda run_id, metrics: sent.extend(metric.key for metric in metrics)
    log.write(0, {"loss": 1.0, "loss/lm": 1.0})
    log.write(1, {"loss": 0.0, "lr": 0.1})
    log.flush()
    assert sent == ["loss/total", "loss/lm", "loss/total", "lr"]


def test_what_a_checkpoint_has_the_server_has_too(data, tmp_path, monkeypatch):
    mlflow, at_checkpoints, save = FakeMlflow(), [], Saver.save
    monkeypatch.setattr(tracker, "_mlflow", lambda: mlflow)
    monkeypatch.setattr(Saver, "save", lambda *args: (at_checkpoints.append(set(mlflow.sent)), save(*args)))
    train_local(job_of(data, tmp_path / "run", STAGE, mlflow={"every": 100}, checkpoint_every=2))
    assert at_checkpoints == [{0, 1}, {0, 1, 2, 3}]


def test_a_server_that_cannot_be_used_is_reported(data, tmp_path):
    pytest.importorskip("mlflow", reason="needs mlflow-skinny (pip install 'lumen-ray[mlflow]')")
    prepared = job_of(data, tmp_path / "run", STAGE, mlflow={"tracking_uri": "nonsense://x"})
    with pytest.raises(UserError, match="MLflow at 'nonsense://x' cannot be used") as error:
        train_local(prepared)
    assert "\n" not in str(error.value)
