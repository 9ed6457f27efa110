"""The five steps of the quickstart on a local Ray, with a recipe of a few steps."""

import hashlib
import json
import re
import subprocess
import sys
import urllib.error

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support.gallery_files import read_gallery
from support.serve_fakes import free_port

from lumen_ray import cli
from lumen_ray.data.images import decode
from lumen_ray.data.shards.shards import read_manifest, read_row_group
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.quickstart import _scene_with_figure, post

pytestmark = pytest.mark.ray

RECIPE = {
    "name": "few-steps",
    "batch_size": 32,
    "workers": 2,
    "stages": [
        {"name": "align", "steps": 1, "groups": [{"tasks": ["caption", "region_caption"]}]},
        {"name": "instruct", "steps": 1, "groups": [{"tasks": ["caption", "vqa", "chat"]}]},
        {"name": "joint", "steps": 2},
        {"name": "decoders", "steps": 1, "trainable": ["lumen"], "groups": [{"tasks": ["detect", "segment", "pose"]}]},
    ],
}


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def made(port, tmp_path_factory):
    """The output folder of a short quickstart, and what it printed, on stdout and stderr together."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["quickstart", "--output", str(folder / "out"), "--recipe", str(folder / "recipe.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "lumen_ray.cli", *command, "--scenes", "64", "--held-out", "16", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder / "out", done.stdout


def test_every_stage_left_a_sharded_checkpoint(made):
    names = sorted(p.parent.name for p in (made[0] / "train" / "checkpoints").glob("*/position.json"))
    assert names == ["0000001-align", "0000002-instruct", "0000004-joint", "0000005-decoders"]
    for name in names:
        assert len(list((made[0] / "train" / "checkpoints" / name).glob("*/*.distcp"))) == 2  # one per worker


def test_the_log_has_every_step_with_losses_and_rates(made):
    lines = [json.loads(line) for line in (made[0] / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    joint = lines[2]
    assert {"loss/lm", "loss/heatmap", "loss/box", "loss/mask", "samples_per_s", "data_wait"} <= set(joint)
    assert any(key.startswith("task/heatmap/") for key in joint)
    assert list((made[0] / "train" / "tensorboard").glob("events*"))


def val_rows(folder):
    """The rows of the held-out shards, in order."""
    shards = folder / "shards" / "val"
    return [
        row
        for file in read_manifest(shards)["files"]
        for group in range(len(file["row_groups"]))
        for row in read_row_group(shards, file["path"], group)
    ]


#: how the lines of Ray, its C++ core, Ray Serve, torch and Python's warnings begin or are marked
FOREIGN = re.compile(
    r"core_worker|raylet|gcs_|ray\.io|\(pid=|serve \d+ --|Warning:"
    r"|^\[?\d{4}-\d\d-\d\d|^\[W\d|^(INFO|WARNING|ERROR|DEBUG)\b"
)


def test_it_prints_no_line_of_ray_serve_or_torch(made):
    assert [line for line in made[1].splitlines() if FOREIGN.search(line)] == []


def test_it_prints_the_five_steps_and_the_log_that_ray_writes_to(made):
    titles = re.findall(r"^(\d)/5 (\w+)$", made[1], re.MULTILINE)
    assert titles == [("1", "prepare"), ("2", "train"), ("3", "evaluate"), ("4", "label"), ("5", "serve")]
    assert re.search(r"log -> \S+", made[1]) and "all steps in" in made[1]


def test_the_report_scores_every_task(made):
    folder, _ = made
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    rows, metrics = val_rows(folder), report["metrics"]
    assert (report["images"], report["scored"], report["skipped"], report["errors"]) == (16, 16, 0, [])
    for name in (
        "box_AP50",
        "mask_AP50",
        "keypoint_AP",
        "refer_p50",
        "vqa_accuracy",
        "caption_attributes",
        "routing_accuracy",
    ):
        assert 0 <= metrics[name] <= 1, name
    assert metrics["box_AP"] <= metrics["box_AP50"] and metrics["captions"] == len(rows) == 16
    assert metrics["vqa_questions"] == sum(m["task"] == "vqa" for row in rows for m in row["messages"])
    predictions = pq.read_table(folder / "evaluation" / "predictions.parquet").to_pylist()
    for task in ("detect", "segment", "caption"):
        assert {p["image_id"] for p in predictions if p["task"] == task} == {row["image_id"] for row in rows}
    weights = (folder / "train" / "model" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest().startswith(report["model"]["version"])


@pytest.fixture(scope="module")
def engine(made):
    return Engine.load(made[0] / "train" / "model")


def test_labels_are_those_of_the_trained_model(made, engine):
    folder = made[0] / "labels"
    rows = [row for part in sorted(folder.glob("labels/*.parquet")) for row in pq.read_table(part).to_pylist()]
    images = {path.name: path.read_bytes() for path in (made[0] / "images").iterdir()}
    assert len(images) == 16 and sorted(images.values()) == sorted(row["image"] for row in val_rows(made[0]))
    for task in ("detect", "segment", "pose", "caption"):
        assert {row["image_id"] for row in rows if row["task"] == task} == set(images)
    name = max(images, key=lambda name: sum(r["image_id"] == name and r["box"] is not None for r in rows))
    requests = [make_request("detect", classes=engine.classes), make_request("caption")]
    detected, captioned = engine.run([decode(images[name])], [requests], score_threshold=0.3)[0]
    labelled = [row for row in rows if row["image_id"] == name and row["task"] == "detect" and row["box"]]
    expected = [(p.phrase, *p.boxes.xyxy[i], p.scores[i]) for p in detected.predictions for i in range(len(p))]
    assert [row["phrase"] for row in labelled] == [phrase for phrase, *_ in expected]
    np.testing.assert_allclose(
        [[*row["box"], row["score"]] for row in labelled], [numbers for _, *numbers in expected], atol=0.05
    )
    assert [r["text"] for r in rows if r["image_id"] == name and r["task"] == "caption"] == [captioned.text]


def test_exports_hold_the_labels(made):
    folder = made[0] / "labels"
    rows = [row for part in sorted(folder.glob("labels/*.parquet")) for row in pq.read_table(part).to_pylist()]
    for task in ("detect", "segment", "pose"):
        coco = json.loads((folder / "coco" / f"{task}.json").read_text())
        assert {image["file_name"] for image in coco["images"]} == {row["image_id"] for row in rows}
        boxes = [row["box"] for row in rows if row["task"] == task and row["box"]]
        exported = np.array([annotation["bbox"] for annotation in coco["annotations"]]).reshape(-1, 4)
        exported[:, 2:] += exported[:, :2]
        np.testing.assert_allclose(exported, np.array(boxes).reshape(-1, 4), atol=0.02)
    captions = json.loads((folder / "coco" / "captions.json").read_text())["annotations"]
    assert [c["caption"] for c in captions] == [row["text"] for row in rows if row["task"] == "caption"]
    assert (folder / "gallery.html").is_file()
    _, cards, _ = read_gallery(folder / "gallery")
    assert {card["i"] for card in cards} == {row["image_id"] for row in rows}


@pytest.mark.parametrize(
    "task", ["detect", "segment", "pose", "count", "ground", "refer", "vqa", "caption", "region_caption", "chat"]
)
def test_served_answers_are_those_of_the_model_and_drawn_on_the_image(made, engine, task):
    answer = json.loads((made[0] / "served" / f"{task}.json").read_text())
    drawn = np.asarray(Image.open(made[0] / "served" / f"{task}.png"))
    assert (answer["task"], answer["model"]) == (task, f"nano@{engine.version}")
    image = decode(_scene_with_figure(made[0] / "shards" / "val")["image"])
    plain = np.asarray(Image.fromarray(image).resize((512, 512), Image.Resampling.LANCZOS))
    if answer.get("text") is not None:
        assert drawn.shape[0] > 512 and len(np.unique(drawn[512:])) > 2  # the text in a strip below
        np.testing.assert_array_equal(drawn[:512], plain)
        return
    assert drawn.shape == plain.shape and (drawn != plain).any() == bool(answer["instances"])
    if task in ("detect", "segment"):
        request = make_request(task, classes=answer["phrases"])
        ((found,),) = engine.run([image], [[request]], score_threshold=0.3)
        assert [i["phrase"] for i in answer["instances"]] == [i["phrase"] for i in found.to_dict()["instances"]]
        for served, own in zip(answer["instances"], found.to_dict()["instances"], strict=True):
            np.testing.assert_allclose([*served["box"], served["score"]], [*own["box"], own["score"]], atol=0.05)
            assert served.get("mask") == own.get("mask")


def test_the_server_is_down_afterwards(made, port):
    with pytest.raises(urllib.error.URLError):
        post(f"http://127.0.0.1:{port}/v1/caption", {})


def test_prepare_does_not_write_over_shards(made, capsys):
    assert cli.main(["prepare", "scenes", "--num", "4", "--output", str(made[0] / "shards" / "train")]) == 2
    assert "already" in capsys.readouterr().err
    assert (made[0] / "shards" / "train" / "manifest.json").is_file()
