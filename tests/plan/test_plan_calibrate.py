"""Calibration measures every stage with the job's own code, and what it records can be replayed."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from support.label_fakes import FakeEngine, encode, picture, write_images

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.inference.request import make_request
from lumen_ray.label.listing import Listing
from lumen_ray.label.workers import WorkerSettings
from lumen_ray.plan import calibrate as module
from lumen_ray.plan.process_tree import cpu_seconds, descendants, rss_bytes
from lumen_ray.plan.recording import Recording


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "_PLANNED", 2000)
    monkeypatch.setattr(module, "_EMPTY_TASKS", 80)
    monkeypatch.setattr(module, "_ENGINE_S", 1.0)


@pytest.mark.ray
def test_every_stage_is_measured_and_replayed(tmp_path, capsys, few):
    images, path = write_images(tmp_path / "images", 20), tmp_path / "recording.json"
    assert cli.main(["plan", "--calibrate", str(images), "--tasks", "detect", "--output", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "calibrate: reading and decoding 20 images" in out and f"recording -> {path}" in out
    recording = Recording.load(path)
    assert recording.images == 20 and recording.megapixels == pytest.approx(48 * 64 / 1e6)
    assert recording.tasks == ["detect"] and recording.num_classes == 12 and recording.device == "cpu"
    assert set(recording.model_wall) == set(recording.model_cpu) == {"1", str(os.cpu_count())}
    assert recording.facts["actor_bytes"] > 1e8
    for name, samples in recording.samples.items():
        assert samples and min(samples) >= 0 and max(samples) < 100, name
        assert max(samples) > 0, name
    assert len(recording.samples["decoding"]) == 20
    assert cli.main(["plan", "--recorded", str(path), "--images", "1000", "--actors", "2"]) == 0
    assert "Bottleneck: " in capsys.readouterr().out


def test_reading_and_decoding_of_images(tmp_path):
    folder = write_images(tmp_path / "images", 5)
    (folder / "broken.png").write_bytes(b"no image")
    reading, decoding, sizes, pixels = module._images(list(Listing(folder)), 64)
    assert len(reading) == len(decoding) == 5 and pixels == [48 * 64] * 5
    assert sorted(sizes) == sorted(path.stat().st_size for path in folder.glob("image*.png"))


def test_images_of_one_input_size_share_passes(tmp_path):
    """As in a job, which does not mix them."""
    folder, passes = tmp_path / "images", []
    folder.mkdir()
    for n in range(12):
        (folder / f"{n:02d}.png").write_bytes(encode(picture(n, (48, 64) if n % 3 else (64, 48))))

    class Engine(FakeEngine):
        def input_size(self, shown):
            return shown.shape[:2]

        def run(self, images, requests, **options):
            passes.append([image.shape[0] for image in images])
            return super().run(images, requests, **options)

    requests = (make_request("detect", classes=["square"]),)
    timer = module._StageTimer(WorkerSettings(Engine, requests, batch_size=4, output=str(tmp_path / "out")))
    seconds, used = timer.answers(list(Listing(folder)))
    assert seconds > 0 and used > 0 and sum(map(len, passes)) == 12
    assert all(len(set(sides)) == 1 for sides in passes) and len(passes) == 3
    assert all(len(image.records) == 1 for image in timer.last)


def test_images_of_which_none_can_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images can be read"):
        module._images(list(Listing(tmp_path)), 64)


def test_listing_is_measured_per_image(tmp_path, few):
    folder = write_images(tmp_path / "images", 5)
    found = module._listing(Listing(folder), list(Listing(folder)), tmp_path)
    assert len(found) == module._REPEATS and all(0 < seconds < 0.1 for seconds in found)


def test_steps_are_per_task():
    assert module._steps(np.arange(0, 33) * 0.5) == pytest.approx([0.5, 0.5])


def test_folders_that_do_not_exist(capsys):
    assert cli.main(["plan", "--calibrate", "nowhere"]) == cli.EXIT_USER_ERROR
    assert "input 'nowhere' does not exist" in capsys.readouterr().err


def test_a_preset_cannot_be_measured(capsys):
    assert cli.main(["plan", "--calibrate", "x", "--preset", "7b"]) == cli.EXIT_USER_ERROR
    assert "give --model instead of --preset" in capsys.readouterr().err


def test_processes_below_this_one_are_counted():
    before = cpu_seconds()
    busy = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", busy, "a-name-of-its-own"])
    try:
        ends = time.monotonic() + 30
        while cpu_seconds() < before + 0.4 and time.monotonic() < ends:
            time.sleep(0.05)
        assert cpu_seconds() >= before + 0.4
        assert str(process.pid) in descendants()
        assert rss_bytes("a-name-of-its-own")[0] > 1e6
    finally:
        process.kill()
        process.wait()
