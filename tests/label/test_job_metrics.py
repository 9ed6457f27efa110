"""What a label job gives to Ray's endpoint."""

from __future__ import annotations

from collections import Counter

import pytest
from support.label_fakes import FakeEngine, encode, picture, write_images

from lumen_ray.label import job_metrics, metrics
from lumen_ray.label.metrics import METRICS, count_actor
from lumen_ray.label.pipeline import label

OPTIONS = {"tasks": ["detect"], "classes": ["square"], "num_actors": 0, "fragment_size": 4, "exports": ()}


@pytest.fixture
def seen(monkeypatch):
    """(name, labels) -> sum that Ray got of counters, newest value of gauges, as in a process of Ray."""
    from ray.util import metrics as of_ray

    values: Counter = Counter()

    def added(self, value, labels):
        values[self.info["name"], *labels.values()] += value

    def put(self, value, labels):
        values[self.info["name"], *labels.values()] = value

    monkeypatch.setattr(of_ray.Counter, "inc", added)
    monkeypatch.setattr(of_ray.Gauge, "set", put)
    for module in (metrics, job_metrics):
        monkeypatch.setattr(module, "in_ray", lambda: True)
    for metric in METRICS:
        monkeypatch.setattr(metric, "_in_ray", None)
    return values


def test_a_job_counts_what_it_does(seen, tmp_path):
    photos, output = write_images(tmp_path / "in", 9), str(tmp_path / "out")
    (photos / "broken.png").write_bytes(b"nothing")
    (photos / "copy.png").write_bytes(encode(picture(0)))
    label(FakeEngine, photos, output, dedup=True, usd_per_hour=3600.0, **OPTIONS)
    size = sum(path.stat().st_size for path in photos.iterdir())
    wanted = {
        ("lumen_label_images", output, "labelled"): 9,
        ("lumen_label_images", output, "copied"): 1,
        ("lumen_label_images", output, "failed"): 1,
        ("lumen_label_errors", output, "broken_image"): 1,
        ("lumen_label_bytes", output): size,
        ("lumen_label_images_listed", output): 11,
        ("lumen_label_images_done", output): 11,
        ("lumen_label_fragments_left", output): 0,
        ("lumen_label_seconds_left", output): 0,
    }
    assert {key: seen[key] for key in wanted} == wanted
    assert metrics.DONE._series == {}  # forgotten with the end of the job
    times = [seen[f"lumen_label_{name}", output] for name in ("model_seconds", "worker_seconds", "usd", "usd_expected")]
    assert min(times) > 0 and times[0] <= times[1]


def test_a_later_run_counts_its_own_images_and_shows_all(seen, tmp_path):
    photos, output = write_images(tmp_path / "in", 4), str(tmp_path / "out")
    label(FakeEngine, photos, output, **OPTIONS)
    seen.clear()
    write_images(photos, 4, start=4)
    label(FakeEngine, photos, output, refresh=True, **OPTIONS)
    assert seen["lumen_label_images", output, "labelled"] == 4 and seen["lumen_label_images_done", output] == 8
    assert ("lumen_label_usd", output) not in seen  # without a price


def test_an_actor_counts_itself_under_a_place_without_credentials(seen):
    count_actor("s3://key:secret@bucket/labels?region=x")
    assert seen == {("lumen_label_actors", "s3://bucket/labels"): 1}


def test_nothing_is_exported_without_ray(seen, monkeypatch, tmp_path):
    for module in (metrics, job_metrics):
        monkeypatch.setattr(module, "in_ray", lambda: False)
    label(FakeEngine, write_images(tmp_path / "in", 2), tmp_path / "out", **OPTIONS)
    count_actor("labels")
    assert seen == {}
