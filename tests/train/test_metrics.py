"""What a run says of its speed is counted, not guessed."""

import pytest
import torch
from tiny_models import scene_batch, tiny_model
from train_fakes import job_of, log_of

from lumen_ray.train import flops
from lumen_ray.train.losses import StepSums, count_tokens
from lumen_ray.train.metrics import Meter, peak_memory
from lumen_ray.train.trainer import train_local

CPU = torch.device("cpu")
SUMS = StepSums({}, {}, tokens=300.0, computed_tokens=400.0)


def test_rates_and_shares():
    meter = Meter(tiny_model(), "fp32", CPU)
    values = meter.read([scene_batch(1)], SUMS, samples=16, waited=0.5, busy=1.5)
    memory = values.pop("memory_gb")
    assert values == {"samples_per_s": 8.0, "tokens_per_s": 150.0, "padding": 0.25, "data_wait": 0.25}
    assert memory == pytest.approx(peak_memory(CPU) / 1e9, rel=0.05) and 0.1 < memory < 64


def test_utilisation_of_a_device_with_a_known_peak(monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda device, precision: 1e12)
    model, batch = tiny_model(), scene_batch(2)
    values = Meter(model, "bf16", CPU).read([batch], SUMS, 2, 0.0, 0.001)
    parts = {name: value for name, value in values.items() if name.startswith("mfu/")}
    assert set(parts) == {"mfu/vision", "mfu/llm", "mfu/dense", "mfu/lumen"}
    assert values["mfu"] == pytest.approx(sum(parts.values()), abs=1e-4)
    assert parts["mfu/llm"] == pytest.approx(flops.of_step(model, [batch])["llm"] / 1e9, abs=1e-5)


def test_tokens_of_pictures_and_prompts():
    batch = scene_batch(3)
    real, computed = count_tokens(batch, 16)
    assert computed == batch["layout"].input_ids.numel() + 3 * 16
    assert real == int((batch["layout"].branch_ids >= 0).sum()) + 3 * 16 < computed
    batch["has_image"][0] = False
    assert count_tokens(batch, 16) == (real - 16, computed)


def test_every_line_of_a_run_has_them(data, tmp_path):
    train_local(job_of(data, tmp_path / "run", {"steps": 2}))
    for line in log_of(tmp_path / "run"):
        assert {"step", "stage", "time", "loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s"} <= line.keys()
        assert line["tokens_per_s"] > line["samples_per_s"] > 0 and 0 <= line["padding"] < 1
        assert 0 <= line["data_wait"] <= 1 and line["memory_gb"] > 0
        assert any(name.startswith("task/lm/") for name in line) and any("task/heatmap/" in name for name in line)
        assert not any(name.startswith("mfu") for name in line)
