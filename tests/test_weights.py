"""The bundled weights: small, with the recipe, seed and metrics that made them, and worth using."""

import hashlib
import json

import numpy as np
import pytest
import yaml

from lumen_ray import cli
from lumen_ray.data.images import decode
from lumen_ray.data.scenes.render import CLASSES, scene_row
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import read_meta
from lumen_ray.presets import DEFAULT_MODEL, bundled_models, model_folder, recipe_path

MB = 1e6


@pytest.fixture(scope="module", params=bundled_models())
def folder(request):
    return model_folder(request.param)


def test_the_default_model_is_bundled():
    assert DEFAULT_MODEL in bundled_models()


def test_they_are_small(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12 * MB


def test_they_say_what_made_them_and_how_good_they_are(folder):
    meta = read_meta(folder)
    recipe = yaml.safe_load(recipe_path(meta.recipe).read_text())
    assert meta.seed == recipe["seed"] and meta.steps == sum(stage["steps"] for stage in recipe["stages"])
    report = json.loads((folder / "report.json").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert report["model"] == {"preset": meta.preset, "version": digest[:12]}
    assert report["images"] == report["scored"] > 100
    least = {"box_AP50": 0.85, "box_AP": 0.60, "mask_AP50": 0.80, "keypoint_AP": 0.50, "refer_p50": 0.80,
             "vqa_accuracy": 0.90}  # fmt: skip
    assert all(report["metrics"][name] >= value for name, value in least.items())


def test_what_the_report_says_is_what_the_weights_do(folder):
    """On scenes of another seed than the report's: most objects are found where they are, under their names."""
    engine, found, names = Engine.load(folder), [], []
    ask = make_request("detect", classes=CLASSES)
    for index in range(16):
        row = scene_row(424242, index)
        (answer,) = engine.run([decode(row["image"])], [[ask]], score_threshold=0.3)[0]
        boxes = {p.phrase: p.boxes.xyxy for p in answer.predictions}
        for thing in row["instances"]:
            near = (
                np.abs(boxes[thing["phrase"]] - np.array(thing["box"])).max(1) if len(boxes[thing["phrase"]]) else [99]
            )
            found.append(min(near) < 6)
            names.append(thing["phrase"])
    assert len(names) > 30 and np.mean(found) > 0.7


@pytest.mark.parametrize(
    "command", [["label", "photos", "--output", "o"], ["evaluate", "--shards", "s", "--output", "o"]]
)
def test_commands_use_them_by_default(command):
    assert cli.build_parser().parse_args(command).model == DEFAULT_MODEL


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder(DEFAULT_MODEL).is_absolute()
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert str(model_folder(DEFAULT_MODEL)) == DEFAULT_MODEL


def test_they_say_what_they_were_trained_for(folder):
    tasks = Engine.load(folder).tasks
    assert {"detect", "segment", "semantic", "pose", "vqa"} <= set(tasks) and "region_segment" not in tasks
