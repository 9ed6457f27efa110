"""Labelling with `dedup` on a local Ray: workers ask one index, which may die."""

import os
import shutil
from collections import Counter
from contextlib import suppress

import pyarrow.parquet as pq
import pytest
from support.clusters import wait_for
from support.label_fakes import FakeEngine, slow_engine, write_images
from support.label_jobs import LabelJob

from lumen_ray.label.content_index import ContentIndex, RemoteIndex, content_keys
from lumen_ray.label.pipeline import label

pytestmark = pytest.mark.ray
OPTIONS = {"tasks": ["segment", "caption"], "classes": ["square"], "fragment_size": 4, "exports": (), "dedup": True}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 different images, then two copies of each."""
    folder = write_images(tmp_path_factory.mktemp("in"), 24)
    for i in range(24):
        for name in ("y", "z"):
            shutil.copy(folder / f"image{i:03d}.png", folder / f"{name}{i:03d}.png")
    return folder


def check(output, folder):
    """Every image has its rows once, and the labels of its pixels; returns the ids of the copied ones."""
    rows = [row for path in (output / "labels").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert Counter(row["image_id"] for row in rows) == {path.name: 2 for path in folder.iterdir()}
    boxes = {row["image_id"]: row["box"] for row in rows if row["task"] == "segment"}
    assert all(boxes[name] == boxes[f"image{name[-7:]}"] for name in boxes)
    return {row["image_id"] for row in rows if row["duplicate_of"] is not None}


def test_actors_copy_from_each_other_and_from_earlier_runs(local_ray, photos, tmp_path):
    summary = label(slow_engine, photos, tmp_path / "out", num_actors=2, **OPTIONS)
    copied = check(tmp_path / "out", photos)
    assert summary["copied"] == len(copied) >= 30 and summary["images"] == 72
    assert 0.2 < summary["model_busy"] <= 1
    removed = sorted((tmp_path / "out" / "ledger").glob("00001*.json"))
    for entry in removed:
        entry.unlink()
    summary = label(slow_engine, photos, tmp_path / "out", num_actors=1, **OPTIONS)
    assert summary["finished_before"] == 72 - 4 * len(removed)
    assert check(tmp_path / "out", photos) >= {f"z{i:03d}.png" for i in range(16, 24)}


@pytest.mark.parametrize("is_restarted", [True, False])
def test_a_job_goes_on_without_its_index(local_ray, photos, tmp_path, monkeypatch, is_restarted):
    started = []
    start = RemoteIndex.start
    monkeypatch.setattr(RemoteIndex, "start", lambda output: started.append(start(output)) or started[-1])

    def kill(status):
        if status.done and len(started) == 1:
            started.append(None)
            local_ray.kill(started[0]._actor, no_restart=not is_restarted)

    label(slow_engine, photos, tmp_path / "out", num_actors=1, progress=kill, **OPTIONS)
    copied = check(tmp_path / "out", photos)
    assert len(started) == 2 and bool(copied) == is_restarted


def test_an_index_that_was_killed_reads_what_was_published(local_ray, photos, tmp_path):
    label(FakeEngine, photos, tmp_path / "out", num_actors=0, **OPTIONS)
    index, expected = RemoteIndex.start(str(tmp_path / "out")), ContentIndex(str(tmp_path / "out"))
    keys = content_keys(pq.read_table(tmp_path / "out" / "labels")["sha256"].to_pylist())
    assert index.find(keys).tolist() == expected.find(keys).tolist() and (expected.find(keys) >= 0).all()

    def process():
        with suppress(local_ray.exceptions.RayError):  # it is away for a moment
            return local_ray.get(index._actor.__ray_call__.remote(lambda self: os.getpid()), timeout=20)

    before = process()
    local_ray.kill(index._actor, no_restart=False)
    wait_for(lambda: process() not in (None, before), "the index's restart", 60)
    index._asks_again = 0
    assert index.find(keys).tolist() == expected.find(keys).tolist()
    index.add(content_keys(["ab" * 32]), 99)
    assert index.find(content_keys(["ab" * 32])).tolist() == [99]


def test_a_killed_job_leaves_nothing_missing_or_doubled(photos, tmp_path):
    """Driver, workers and index are processes of their own, all killed at once."""
    job = LabelJob(photos, tmp_path / "out", OPTIONS)
    job.kill_after(8)  # two of which hold copies
    assert 8 <= len(job.ledger.done()) < 18
    summary = job.run()
    assert summary["images"] == summary["labelled"] == 72
    assert len(check(tmp_path / "out", photos)) >= 30
