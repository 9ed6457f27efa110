"""What a run gives to Ray's endpoint."""

from __future__ import annotations

import pytest

from lumen_ray.train.metrics import prometheus
from lumen_ray.train.metrics.prometheus import METRICS, RunMetrics, count_restart


class Steps:
    """In place of a recipe."""

    total_steps = 100


@pytest.fixture
def seen(monkeypatch):
    """(name, labels but the run) -> newest value that Ray got, as in a process of Ray."""
    from ray.util import metrics

    values: dict = {}

    def noted(self, value, labels):
        assert labels.pop("run") == "/runs/one"
        values[self.info["name"], *labels.values()] = value

    monkeypatch.setattr(metrics.Gauge, "set", noted)
    monkeypatch.setattr(metrics.Counter, "inc", noted)
    monkeypatch.setattr(prometheus, "in_ray", lambda: True)
    for metric in METRICS:
        monkeypatch.setattr(metric, "_in_ray", None)
    return values


def test_the_values_of_a_step(seen, tmp_path):
    run = RunMetrics("/runs/one", Steps(), 40)
    assert seen == {("lumen_train_step",): 40, ("lumen_train_recipe_steps",): 100, ("lumen_train_checkpoint_step",): 40}
    seen.clear()
    values = {
        "loss": 3.5, "loss/lm": 2.0, "task/lm/caption": 1.5, "source/lm/coco/2017": 1.25, "passes/coco/2017": 0.5,
        "validation/detect/AP": 0.25, "lr": 1e-4, "grad_norm": 0.75, "samples_per_s": 8.0, "tokens_per_s": 900.0,
        "data_wait": 0.125, "padding": 0.25, "mfu": 0.375, "mfu/llm": 0.25, "memory_gb": 2.0, "truncated_tokens": 3,
    }  # fmt: skip
    run.write(40, values)
    run.saved(41, 12.5)
    assert seen == {
        ("lumen_train_step",): 41,
        ("lumen_train_loss", "total"): 3.5,
        ("lumen_train_loss", "lm"): 2.0,
        ("lumen_train_task_loss", "lm", "caption"): 1.5,
        ("lumen_train_source_loss", "lm", "coco/2017"): 1.25,
        ("lumen_train_passes", "coco/2017"): 0.5,
        ("lumen_train_validation", "detect/AP"): 0.25,
        ("lumen_train_learning_rate",): 1e-4,
        ("lumen_train_grad_norm",): 0.75,
        ("lumen_train_samples_per_second",): 8.0,
        ("lumen_train_tokens_per_second",): 900.0,
        ("lumen_train_data_wait",): 0.125,
        ("lumen_train_padding",): 0.25,
        ("lumen_train_mfu",): 0.375,
        ("lumen_train_memory_bytes",): 2e9,
        ("lumen_train_checkpoint_step",): 41,
        ("lumen_train_checkpoint_seconds",): 12.5,
    }


def test_a_restart_is_counted_with_its_cause(seen):
    count_restart("/runs/one", ConnectionResetError("gone"))
    assert seen == {("lumen_train_restarts", "ConnectionResetError"): 1}


def test_a_run_in_a_bucket_is_named_without_credentials(monkeypatch, seen):
    names = []
    monkeypatch.setattr(prometheus.RESTARTS, "record", lambda **labels: names.append(labels["run"]))
    count_restart("s3://key:secret@bucket/runs?region=x", ValueError())
    assert names == ["s3://bucket/runs"]


def test_nothing_is_exported_without_ray(seen, monkeypatch):
    monkeypatch.setattr(prometheus, "in_ray", lambda: False)
    run = RunMetrics("/runs/one", Steps(), 0)
    run.write(0, {"loss": 1.0})
    run.saved(1, 1.0)
    count_restart("/runs/one", ValueError())
    assert seen == {}
