"""Losses and passes by the source of the shards."""

import shutil

import pytest
import torch
from support.tiny_models import scene_batch, tiny_model
from support.train_fakes import cut_after, job_of, log_of, on_two_ranks

from lumen_ray.data.shards.shards import ShardWriter, build_manifest, read_manifest, read_row_group, write_manifest
from lumen_ray.train.launch import train_local
from lumen_ray.train.losses import StepLosses, StepSums, per_source, per_task
from lumen_ray.train.metrics.sources import SourceProgress, rows_by_source, totals

CPU = torch.device("cpu")
STAGE = {"steps": 4, "groups": [{"tasks": ["detect", "caption", "vqa"]}]}


@pytest.fixture(scope="module")
def two_sources(data, tmp_path_factory):
    """The scenes of `data`, every third row of another source."""
    folder = tmp_path_factory.mktemp("sources")
    manifest = read_manifest(data / "shards")
    entries = []
    for file in manifest["files"]:
        with ShardWriter(folder / "shards", file["path"], rows_per_group=4) as writer:
            for group in range(len(file["row_groups"])):
                for number, row in enumerate(read_row_group(data / "shards", file["path"], group)):
                    writer.write({**row, "source": "drawn" if (group + number) % 3 else "photos"})
        entries.append(writer.entry)
    write_manifest(folder / "shards", build_manifest(entries, categories=manifest["categories"]))
    shutil.copy(data / "tiny.yaml", folder)
    return folder


def test_losses_by_source_add_up_to_those_of_the_batch():
    model, batch = tiny_model(), scene_batch(4)
    batch.sources = ["a", "b", "a", "a"]
    losses, names = model(batch), model.loss_names
    by_source, by_task = per_source(batch, losses, names, ("a", "b"), CPU), per_task(batch, losses, names, CPU)
    torch.testing.assert_close(by_source.sum(-1), by_task.sum(-1))
    assert (by_source[:, 1].sum(0) > 0).all()
    alone = scene_batch(4)
    alone.sources = ["a"] * 4
    assert per_source(alone, losses, names, ("a", "b"), CPU)[..., 1].abs().sum() == 0
    step = StepLosses(names, {}, [batch], CPU, ("a", "b"))
    step.add_batch(batch, losses)
    sums = step.totals()
    assert sums.samples == {"a": 3, "b": 1}
    row = names.index("lm")
    for column, source in enumerate(("a", "b")):
        wanted = by_source[row, 0, column] / by_source[row, 1, column]
        assert sums.sources[f"lm/{source}"] == pytest.approx(float(wanted))


def test_a_run_logs_them_over_restarts(two_sources, tmp_path):
    manifest = read_manifest(two_sources / "shards")
    rows = rows_by_source(manifest)
    assert sum(rows.values()) == 32 and set(rows) == {"drawn", "photos"}
    run = tmp_path / "run"
    train_local(job_of(two_sources, run, STAGE, checkpoint_every=2))
    whole = log_of(run)
    cut_after(run, 2)
    train_local(job_of(two_sources, run, STAGE, checkpoint_every=2))
    for lines in (whole, log_of(run)):
        last = lines[-1]
        assert last["samples/drawn"] + last["samples/photos"] == 32  # 4 steps of 8: one pass
        assert last["passes/drawn"] == last["passes/photos"] == 1.0
        assert {"source/lm/drawn", "source/lm/photos", "source_loss/drawn", "task_loss/detect"} <= last.keys()
        assert [line["samples/drawn"] + line["samples/photos"] for line in lines] == [8, 16, 24, 32]


def test_two_ranks_log_what_one_does(two_sources, tmp_path):
    train_local(job_of(two_sources, tmp_path / "one", STAGE))
    on_two_ranks(train_local, job_of(two_sources, tmp_path / "two", STAGE, workers=2))
    one, two = (log_of(tmp_path / name)[0] for name in ("one", "two"))
    names = [name for name in one if name.startswith(("source", "samples/", "passes"))]
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-3)


def test_shards_written_without_sources_are_trained_on_without_them(data, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(data / "shards", folder / "shards")
    shutil.copy(data / "tiny.yaml", folder)
    manifest = read_manifest(folder / "shards")
    for file in manifest["files"]:
        for group in file["row_groups"]:
            del group["sources"]
    write_manifest(folder / "shards", manifest)
    assert rows_by_source(manifest) == {}
    train_local(job_of(folder, tmp_path / "run", {"steps": 1, "groups": [{"tasks": ["caption"]}]}))
    assert not [name for name in log_of(tmp_path / "run")[0] if name.startswith(("source", "samples/", "passes"))]


def test_progress_goes_on_from_the_last_line():
    progress = SourceProgress({"a": 100, "b": 50}, {"samples/a": 90, "passes/a": 0.9})
    values = progress.add(StepSums({}, {}, 0.0, 0.0, 8, samples={"a": 5, "b": 3}))
    assert values == {"samples/a": 95, "samples/b": 3, "passes/a": 0.95, "passes/b": 0.06}
    assert totals({"lm/a": 1.0, "box/a": 2.0, "lm/b": 3.0}, {"box": 0.5}) == {"a": 2.0, "b": 3.0}
