"""Recordings are files that only what wrote them may replay."""

import json

import pytest
from support.plan_fakes import WORK, recording

from lumen_ray.errors import UserError
from lumen_ray.plan.recording import VERSION, Recording


def test_a_recording_is_read_as_it_was_written(tmp_path):
    recording().save(tmp_path / "r.json")
    read = Recording.load(tmp_path / "r.json")
    assert read == recording()
    assert read.model_work() == WORK


@pytest.mark.parametrize(
    ("threads", "cores", "seconds"),
    [(1, 1.0, (0.09, 0.11)), (2, 0.24 / 0.14, (0.11, 0.13)), (4, 0.24 / 0.14, (0.11, 0.13))],
)
def test_a_model_on_cpus_takes_cpu_seconds_of_as_many_cores_as_it_used(threads, cores, seconds):
    times = recording().times(threads)
    assert times.model.samples == seconds and times.model_cores == pytest.approx(cores)
    assert times.driver.samples == (0.008,) and times.batch_size == 8 and times.ray_start_s == 3.0


def test_a_model_on_a_gpu_takes_seconds_and_one_core():
    times = recording(device="cuda").times(2)
    assert times.model.samples == (0.06, 0.08) and times.model_cores == 1


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda data: data | {"version": VERSION + 1}, "other_version", f"reads version {VERSION}; record again"),
        (lambda data: {"images": 3}, "invalid_recording", "is not a recording"),
        (lambda data: [1], "invalid_recording", "is not a recording"),
        (lambda data: {k: v for k, v in data.items() if k != "samples"}, "invalid_recording", "is damaged"),
        (lambda data: data | {"samples": {"driver": [1]}}, "invalid_recording", "is damaged"),
        (lambda data: data | {"model_wall": {}}, "invalid_recording", "is damaged"),
        (lambda data: data | {"work": {}}, "invalid_recording", "is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, change, reason, said):
    path = tmp_path / "r.json"
    recording().save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=said) as caught:
        Recording.load(path)
    assert caught.value.reason == reason


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="does not exist; make one with"):
        Recording.load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="is not a recording"):
        Recording.load(tmp_path / "r.json")
