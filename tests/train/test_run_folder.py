"""What a run folder remembers, and what a worker does with an error."""

import json
import time

import pytest
from tiny_models import tiny_settings
from train_fakes import make_job, make_recipe

from lumen_ray.errors import UserError
from lumen_ray.train import trainer as trainer_module
from lumen_ray.train.loop import DivergedError
from lumen_ray.train.metrics import MetricsWatcher, drop_from
from lumen_ray.train.run_folder import FAILED, forget_failure, keep_start, raise_failure, run_once, start_of
from lumen_ray.train.trainer import _check_cpus, train, train_local


def failing(error, cause=None):
    def fit():
        raise error from cause

    return fit


@pytest.mark.parametrize("error", [UserError("mend this", "broken_shards"), DivergedError("loss lm is not finite")])
def test_an_error_to_mend_is_recorded_and_not_tried_again(tmp_path, error):
    run_once(tmp_path, failing(RuntimeError("wrapped by Ray"), error))
    calls = []
    run_once(tmp_path, lambda: calls.append(1))  # the restarted group
    assert calls == []
    with pytest.raises(UserError, match=str(error)) as found:
        raise_failure(tmp_path)
    assert found.value.reason == getattr(error, "reason", "training_diverged")
    forget_failure(tmp_path)
    raise_failure(tmp_path)
    run_once(tmp_path, lambda: calls.append(1))
    assert calls == [1]


def test_one_rank_alone_raises_so_that_the_others_do_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("lumen_ray.train.parallel.world_size", lambda: 2)
    with pytest.raises(UserError, match="mend this"):
        run_once(tmp_path, failing(UserError("mend this")))
    assert (tmp_path / FAILED).exists()
    forget_failure(tmp_path)
    run_once(tmp_path, failing(DivergedError("nan")))  # all ranks see it in the same step
    assert json.loads((tmp_path / FAILED).read_text())["message"] == "nan"


def test_a_crash_is_left_to_ray(tmp_path):
    with pytest.raises(OSError, match="disk"):
        run_once(tmp_path, failing(OSError("disk")))
    assert not (tmp_path / FAILED).exists()


def test_a_run_is_continued_with_what_it_was_started_with(data, tmp_path):
    manifest = {"files": [{"sha256": "a"}], "categories": []}
    settings = tiny_settings()
    start = start_of(make_recipe(data), settings, manifest, None)
    keep_start(tmp_path, start, resumes=False)
    keep_start(tmp_path, start, resumes=True)
    others = {
        "recipe": start_of(make_recipe(data, seed=1), settings, manifest, None),
        "model settings": start_of(make_recipe(data), tiny_settings(link_channels=64), manifest, None),
        "shards": start_of(make_recipe(data), settings, {**manifest, "files": [{"sha256": "b"}]}, None),
        "init_from": start_of(make_recipe(data), settings, manifest, "/m"),
    }
    for name, other in others.items():
        with pytest.raises(UserError, match=f"a run of another {name};") as error:
            keep_start(tmp_path, other, resumes=True)
        assert error.value.reason == "run_exists"
    keep_start(tmp_path, others["recipe"], resumes=False)


def test_a_run_killed_before_its_export_needs_no_ray(data, tmp_path, monkeypatch):
    model = train_local(make_job(data, tmp_path / "run", stages=((2, None),)))
    before = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    monkeypatch.setattr(trainer_module, "_fit", lambda *_: pytest.fail("Ray was started"))
    recipe = make_recipe(data, stages=((2, None),))
    assert train(data / "shards", recipe, tmp_path / "run") == model
    assert (model / "model.safetensors").read_bytes() == before
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_two_workers_fit_on_two_cores():
    _check_cpus(2, 2)
    with pytest.raises(UserError, match="has 1 CPUs but 2 workers and their reads need 2"):
        _check_cpus(1, 2)


def line(step):
    return json.dumps({"step": step}) + "\n"


def test_lines_that_are_written_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_from(path, 0)
    path.write_text("".join(map(line, range(5))) + '{"step": 5, "lo')
    drop_from(path, 3)
    assert path.read_text() == "".join(map(line, range(3)))
    inode = path.stat().st_ino
    drop_from(path, 3)
    assert path.stat().st_ino == inode


def test_the_watcher_tells_each_step_once(tmp_path):
    path, told = tmp_path / "metrics.jsonl", []
    path.write_text(line(0) + line(1))
    watcher = MetricsWatcher(path, 2, lambda entry: told.append(entry["step"]))
    with open(path, "a") as file:
        file.write(line(2) + line(3))
    deadline = time.monotonic() + 20
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    drop_from(path, 2)  # the workers start again from the checkpoint at step 2
    with open(path, "a") as file:
        file.write(line(2) + line(3) + line(4))
    watcher.stop()
    assert told == [2, 3, 4]
