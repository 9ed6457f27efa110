"""A decoder of another package through the whole product, with no edit of `lumen_ray`: it is built, trained in two
stages, counted in FLOPs and memory, evaluated, used for labels, served over HTTP, and shown by `doctor`."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.plug_ins import install, lumen_ray, python
from support.tiny_models import SIDE, tiny_settings

from lumen_ray.model.build import read_meta

TRAIN = """
import sys
from pathlib import Path
from lumen_ray import config
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import prepare_job, train_local

folder = Path(sys.argv[1])
recipe = config.load(Recipe, folder / "recipe.yaml")
print(train_local(prepare_job(folder / "shards", recipe, folder / "run")))
"""
COUNT = """
import json, sys
from support.tiny_models import scene_batch
from lumen_ray.footprint import roles_of
from lumen_ray.model.build import load_model
from lumen_ray.train.metrics import flops

model = load_model(sys.argv[1]).model
batch = scene_batch(2, ("detect", "caption"))
memory = {role.name: role.parameters for role in roles_of(model)}
print(json.dumps({"flops": flops.of_step(model, [batch]), "memory": memory, "losses": model.loss_names}))
"""
SERVE = """
import base64, json, sys, urllib.request
from lumen_ray import serve

model, port, image = sys.argv[1:]
server = serve(model, port=int(port), blocking=False)
body = {"image": base64.b64encode(open(image, "rb").read()).decode(), "classes": ["red circle"], "score_threshold": 0}
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(server.url + "/v1/detect", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=60) as response:
    answer = json.loads(response.read())
server.stop()
print("ANSWER " + json.dumps(answer))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "lumen-toy", {"toy": "support.toy_decoder:SPEC"})
    return folder


@pytest.fixture(scope="module")
def folder(site, tmp_path_factory) -> Path:
    """Shards, a preset with the toy decoder alone, and a model that was trained in two stages."""
    folder = tmp_path_factory.mktemp("toy")
    lumen_ray(
        site, "prepare", "scenes", "--num", "16", "--side", str(SIDE), "--rows-per-group", "4", "--workers", "0",
        "--output", str(folder / "shards"),
    )  # fmt: skip
    preset = tiny_settings(vocab_size=330, lumen=None).model_dump(mode="json") | {"toy": {"hidden_size": 8}}
    (folder / "toy.yaml").write_text(yaml.safe_dump(preset | {"name": "toy"}))
    stages = [
        {"name": "joint", "steps": 3, "groups": [{"tasks": ["detect", "caption"]}]},
        {"name": "decoders", "steps": 3, "trainable": ["toy"], "groups": [{"tasks": ["detect"]}]},
    ]
    recipe = {"name": "toy", "model": str(folder / "toy.yaml"), "batch_size": 4, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    python(site, "-c", TRAIN, str(folder))
    return folder


def test_it_learns_in_two_stages(folder):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["joint"] * 3 + ["decoders"] * 3
    assert all(line["loss/toy_present"] > 0 and line["loss/toy_box"] > 0 for line in lines)
    saved = yaml.safe_load((folder / "run" / "model" / "config.yaml").read_text())
    assert saved["toy"] == {"hidden_size": 8} and saved["lumen"] is None


def test_it_is_counted_in_flops_and_memory(site, folder):
    counted = json.loads(python(site, "-c", COUNT, str(folder / "run" / "model")).stdout)
    assert counted["losses"] == ["lm", "toy_present", "toy_box"]
    assert set(counted["flops"]) == {"vision", "llm", "dense", "toy"} and counted["flops"]["toy"] > 0
    preset = tiny_settings()
    assert counted["memory"]["toy"] == (preset.dense_channels + preset.link_channels + 1) * 8 + 9 * 5


def test_it_is_evaluated(site, folder):
    lumen_ray(
        site, "evaluate", "--model", str(folder / "run" / "model"), "--shards", str(folder / "shards"),
        "--output", str(folder / "evaluation"), "--tasks", "detect,count", "--limit", "4",
    )  # fmt: skip
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    assert set(report["tasks"]) == {"detect", "count"}


def test_it_labels(site, folder):
    lumen_ray(
        site, "label", str(folder / "shards"), "--model", str(folder / "run" / "model"), "--tasks", "detect",
        "--score-threshold", "0", "--actors", "0", "--output", str(folder / "labels"),
    )  # fmt: skip
    rows = pq.read_table(folder / "labels" / "labels").to_pylist()
    assert len({row["image_id"] for row in rows}) == 16
    assert {row["phrase"] for row in rows} == set(read_meta(folder / "run" / "model").classes)
    assert all(0 < row["score"] < 1 and len(row["box"]) == 4 for row in rows)


def test_doctor_shows_it(site, folder):
    shown = lumen_ray(site, "doctor", "--preset", str(folder / "toy.yaml"), check=False).stdout
    assert "toy of package 'lumen-toy': one box per prompt (detect, count)" in shown
    assert any(line.split()[:2] == ["-", "toy"] and "parameters" in line for line in shown.splitlines())


@pytest.mark.ray
def test_it_is_served_over_http(site, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    row = pq.read_table(folder / "shards" / "part-00000.parquet", columns=["image"]).slice(0, 1).to_pylist()[0]
    (folder / "scene.jpg").write_bytes(row["image"])
    out = python(site, "-c", SERVE, str(folder / "run" / "model"), str(port), str(folder / "scene.jpg")).stdout
    (answer,) = [line.removeprefix("ANSWER ") for line in out.splitlines() if line.startswith("ANSWER ")]
    (instance,) = json.loads(answer)["instances"]
    assert instance["phrase"] == "red circle" and len(instance["box"]) == 4
