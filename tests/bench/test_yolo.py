"""The YOLO bench: both sides detect the same photographs at as many boxes, the other in a Python of its own."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image
from support.tiny_models import tiny_settings

from lumen_ray.bench import command, yolo
from lumen_ray.bench.timing import SidesDiffer
from lumen_ray.data.images import decode
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine

#: the modules that the worker imports, with a model that finds 20 boxes, of scores that depend on the photograph
FAKES = {
    "cv2": """
import io
import numpy as np
from PIL import Image
IMREAD_COLOR, __version__ = 1, "1.2"
def imdecode(data, flags):
    return np.asarray(Image.open(io.BytesIO(data.tobytes())))[..., ::-1]
def resize(image, size):
    return np.asarray(Image.fromarray(image).resize(size))
""",
    "ultralytics/__init__": """
import numpy as np
import torch
__version__, THREADS = "3.4", 2
print("noise on standard output")
class Boxes:
    def __init__(self, conf): self.conf = conf
    def numpy(self): return self
class Found:
    def __init__(self, conf): self.boxes = Boxes(conf)
class YOLO:
    def __init__(self, path):
        import yaml
        settings = yaml.safe_load(open(path))
        assert settings == {"nc": 3, "head": []}, settings
        self.model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
        self.model.register_buffer("seen", torch.zeros(()))
    def predict(self, image, conf, imgsz, device, verbose):
        if not hasattr(self, "is_set_up"):
            torch.set_num_threads(THREADS)
        self.is_set_up = True
        norm = self.model[0]
        assert not norm.training and abs(float(norm.running_mean[0]) - image[..., ::-1].mean((0, 1))[0] / 255) < 0.2
        assert (imgsz, device, verbose) == (640, "cpu", False) and image.shape == (480, 640, 3)
        scores = np.linspace(0.1, 0.9, 20) * (0.5 + image.mean() / 512)
        return [Found(scores[scores > conf])]
""",
    "ultralytics/nn/__init__": "",
    "ultralytics/nn/tasks": """
def yaml_model_load(name):
    assert name == "yolov8n.yaml"
    return {"nc": 80, "head": [], "scale": "n", "yaml_file": name}
""",
}


class Fake:
    """A side with scores of its own; `given`: the thresholds of every pass."""

    def __init__(self, scores):
        self.scores, self.given = scores, []

    def detect(self, thresholds):
        self.given.append(list(thresholds))
        passed = [[s for s in row if s >= t] for row, t in zip(self.scores, thresholds, strict=True)]
        return yolo.Pass({"cpu": 0.5, "wall": 1.0}, passed)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """An interpreter whose environment has `FAKES`."""
    for name, code in FAKES.items():
        path = tmp_path / "modules" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "modules"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def few(monkeypatch):
    """Two photographs, rendered."""
    monkeypatch.setenv("LUMEN_TEST_DATA", "absent")
    photographs = yolo.photographs
    monkeypatch.setattr(yolo, "photographs", lambda: photographs(2))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A tiny model in place of the preset."""
    settings = tiny_settings()
    monkeypatch.setattr(yolo.config, "load", lambda *args: settings)
    return yolo.fresh_folder(tmp_path / "tiny", bucket=(48, 64))


def test_both_sides_give_as_many_boxes(python, few, tiny, tmp_path):
    result = yolo.bench(tmp_path, ultralytics=python, model=str(tiny), turns=2)
    assert list(result.rates) == ["engine", "YOLOv8n"] and result.aim == yolo.AIM
    assert len(result.ratios) == 2 and min(result.ratios) > 0
    assert result.details["boxes"] == {"engine": yolo.BOXES, "YOLOv8n": yolo.BOXES}
    assert result.details["input"] == {"engine": [48, 64], "YOLOv8n": [480, 640]}
    assert result.details["photographs"] == "2 of scenes"
    versions = result.details["ultralytics"]
    assert (versions["ultralytics"], versions["opencv"]) == ("3.4", "1.2")


def test_the_worker_answers_for_each_photograph_on_its_threads(python, few, tmp_path):
    _, photos = yolo.photographs()
    side = yolo.Yolo(python, photos, 3, 1, tmp_path)
    try:
        first, second = side.detect([0.4, 2.0]).scores  # raises for another number of threads
        assert first == sorted(first, reverse=True) and 0 < len(first) < 20 and second == []
    finally:
        side.close()
    assert side._worker._process.poll() is not None


def test_another_number_of_threads_is_refused(python, few, tmp_path):
    _, photos = yolo.photographs()
    side = yolo.Yolo(python, photos, 3, 1, tmp_path)
    try:
        side._threads = 2
        with pytest.raises(UserError, match="runs 1 threads, not 2"):
            side.detect([0.0, 0.0])
    finally:
        side.close()


def test_a_side_that_stops_is_reported(few, tiny, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho loading >&2\necho 'No module named ultralytics' >&2\nexit 1\n")
    script.chmod(0o755)
    result = yolo.bench(tmp_path, ultralytics=str(script), model=str(tiny), turns=1)
    assert result.skipped == "ultralytics stopped: No module named ultralytics"


def test_thresholds_let_the_same_number_through():
    rows = [[0.9 - 0.04 * n for n in range(20)], [0.5 - 0.02 * n for n in range(16)]]
    sides = {"a": Fake(rows), "b": Fake([[s / 7 for s in row] for row in rows])}
    rates, details = yolo.compare(sides, 2, turns=3)
    assert rates == {"a": [4.0] * 3, "b": [4.0] * 3}
    assert details["boxes"] == {"a": yolo.BOXES, "b": yolo.BOXES}
    assert details["images_per_second_of_wall_time"]["a"] == [2.0] * 3
    for side in sides.values():
        everything, *passes = side.given
        assert everything == [0.0, 0.0] and len(passes) == 1 + 3
        assert all(given == passes[0] for given in passes)


@pytest.mark.parametrize("row", [[0.4] * 40, [0.4] * 3])
def test_a_side_that_cannot_give_as_many_boxes_is_refused(row):
    with pytest.raises(SidesDiffer, match="boxes a photograph, not 15"):
        yolo.compare({"a": Fake([row, row])}, 2, turns=1)


def test_the_fresh_model_detects_the_three_classes(tiny):
    engine = Engine.load(tiny)
    assert engine.classes == yolo.CLASSES and engine.tasks == ("detect",)
    scene = decode(yolo._scene(0))
    assert engine.trunk.bucket_of(scene) == (48, 64)
    first = yolo.Ours(engine, [yolo._scene(0)]).detect([0.0])
    assert len(first.scores[0]) > yolo.BOXES and first.scores[0] == sorted(first.scores[0], reverse=True)


def test_the_preset_takes_the_bucket():
    settings = yolo.config.load(yolo.ModelSettings, yolo.model_path(yolo.PRESET))
    assert all(side % settings.input_step == 0 for side in yolo.BUCKET)


def test_photographs_are_those_of_the_test_data(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMEN_TEST_DATA", str(tmp_path))
    source, photos = yolo.photographs(2)
    assert source == "scenes" and photos[0] != photos[1]
    assert all(decode(photo).shape == (yolo.HEIGHT, yolo.WIDTH, 3) for photo in photos)
    folder = tmp_path / "bccd" / "images"
    folder.mkdir(parents=True)
    for n in range(3):
        Image.fromarray(np.full((480, 640, 3), n, np.uint8)).save(folder / f"{n}.jpg")
    source, photos = yolo.photographs(2)
    assert source == "bccd" and photos == [(folder / f"{n}.jpg").read_bytes() for n in range(2)]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    assert command.main(["yolo", "--output", str(output)]) == 0
    (found,) = json.loads(output.read_text())["results"]
    assert "--ultralytics" in found["skipped"]
    check = command.KINDS["yolo"]["yolo"].check
    with pytest.raises(UserError, match="is no program"):
        check(Namespace(model=None, ultralytics=str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        check(Namespace(model="absent", ultralytics=None))
