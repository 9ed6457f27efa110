"""What a run says of its speed is counted, not guessed."""

import pytest
import torch
import yaml
from support.tiny_models import SIDE, scene_batch, tiny_model, tiny_settings
from support.train_fakes import job_of, log_of
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lumen_ray.data.batches.feed import local_batches
from lumen_ray.data.batches.plan import Plan
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.train.launch import train_local
from lumen_ray.train.losses import StepSums, count_tokens
from lumen_ray.train.metrics import flops
from lumen_ray.train.metrics.metrics import Meter, peak_memory
from lumen_ray.train.run.saver import Saver
from lumen_ray.train.trainer import Trainer

CPU = torch.device("cpu")
SUMS = StepSums({}, {}, tokens=300.0, computed_tokens=400.0, images=16)


def test_rates_and_shares():
    meter = Meter(tiny_model(), "fp32", CPU)
    values = meter.metrics([scene_batch(1)], SUMS, waited=0.5, busy=1.5)
    memory = values.pop("memory_gb")
    assert values == {"samples_per_s": 8.0, "tokens_per_s": 150.0, "padding": 0.25, "data_wait": 0.25}
    assert memory == pytest.approx(peak_memory(CPU) / 1e9, rel=0.05) and 0.1 < memory < 64


def test_utilisation_of_a_device_with_a_known_peak(monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda device, precision: 1e12)
    model, batch = tiny_model(), scene_batch(2)
    values = Meter(model, "bf16", CPU).metrics([batch], SUMS, 0.0, 0.001)
    parts = {name: value for name, value in values.items() if name.startswith("mfu/")}
    assert set(parts) == {"mfu/vision", "mfu/llm", "mfu/dense", "mfu/lumen"}
    assert values["mfu"] == pytest.approx(sum(parts.values()), abs=1e-4)
    assert parts["mfu/llm"] == pytest.approx(flops.of_step(model, [batch])["llm"] / 1e9, abs=1e-5)


def test_tokens_of_pictures_and_prompts():
    batch = scene_batch(3)
    real, computed = count_tokens(batch, 16)
    assert computed == batch.layout.input_ids.numel() + 3 * 16
    assert real == int((batch.layout.branch_ids >= 0).sum()) + 3 * 16 < computed
    batch.has_image[0] = False
    assert count_tokens(batch, 16) == (real - 16, computed)


def test_images_are_counted_where_a_row_group_is_short(tmp_path):
    """6 scenes in row groups of 4: two of the four steps' batches of one row group have 2 images."""
    prepare_source(tmp_path / "shards", ScenesSource(6, side=SIDE), rows_per_group=4, workers=0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(vocab_size=330).model_dump(mode="json")))
    prepared = job_of(tmp_path, tmp_path / "run", {"steps": 4}, batch_size=4)
    trainer, seen = Trainer(prepared.job, CPU), []
    trainer.meter.metrics = lambda batches, sums, waited, busy: seen.append(sums.images) or {}
    trainer.fit(local_batches(prepared.reader, Plan(prepared.manifest, prepared.job.recipe)))
    assert sorted(seen) == [2, 2, 4, 4]


def scalars(run):
    """step -> the scalars of TensorBoard's files, without what a later session hides."""
    found = {}
    for path in sorted((run / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = {step: values for step, values in found.items() if step < event.step}
            elif event.summary.value:
                found[event.step] = {value.tag: value.simple_value for value in event.summary.value}
    return found


class Killed(BaseException):
    pass


def test_what_a_checkpoint_has_tensorboard_has_too(data, tmp_path, monkeypatch):
    """Killed at the checkpoint of step 2 and resumed: no step is missing."""
    run, options = tmp_path / "run", {"checkpoint_every": 2}
    prepared = job_of(data, run, {"steps": 4}, **options)
    trainer, save, on_disk = Trainer(prepared.job, CPU), Saver.save, []

    def killed(*args):
        save(*args)
        trainer.saver.wait()
        on_disk.extend(scalars(run))
        raise Killed

    monkeypatch.setattr(Saver, "save", killed)
    with pytest.raises(Killed):
        trainer.fit(local_batches(prepared.reader, Plan(prepared.manifest, prepared.job.recipe)))
    monkeypatch.undo()
    assert on_disk == [0, 1]
    train_local(job_of(data, run, {"steps": 4}, **options))
    found, lines = scalars(run), log_of(run)
    assert list(found) == [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        numbers = {name: value for name, value in line.items() if name not in ("step", "stage", "time")}
        assert found[line["step"]] == pytest.approx(numbers, rel=1e-5)


def test_every_line_of_a_run_has_them(data, tmp_path):
    train_local(job_of(data, tmp_path / "run", {"steps": 2}))
    for line in log_of(tmp_path / "run"):
        assert {"step", "stage", "time", "loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s"} <= line.keys()
        assert line["tokens_per_s"] > line["samples_per_s"] > 0 and 0 <= line["padding"] < 1
        assert 0 <= line["data_wait"] <= 1 and line["memory_gb"] > 0
        assert any(name.startswith("task/lm/") for name in line) and any("task/heatmap/" in name for name in line)
        assert not any(name.startswith("mfu") for name in line)
