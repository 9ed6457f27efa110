"""The five steps of the quickstart on a local Ray, with a recipe of a few steps."""

import json
import urllib.error

import pytest
import yaml

from lumen_ray import cli
from lumen_ray.quickstart import post, quickstart

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
def made(tmp_path_factory):
    """The folder a short quickstart made, its report, and what the server told while it was up."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    report = quickstart(folder / "out", recipe_name=str(folder / "recipe.yaml"), scenes=64, held_out=16, port=8123)
    return folder / "out", report


def test_every_stage_left_a_sharded_checkpoint(made):
    names = sorted(p.parent.name for p in (made[0] / "train" / "checkpoints").glob("*/position.json"))
    assert names == ["0000001-align", "0000002-instruct", "0000004-joint", "0000005-decoders"]
    for name in names:
        assert len(list((made[0] / "train" / "checkpoints" / name).glob("*.distcp"))) == 2  # one per worker


def test_the_log_has_every_step_with_losses_and_rates(made):
    lines = [json.loads(line) for line in (made[0] / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    joint = lines[2]
    assert {"loss/lm", "loss/heatmap", "loss/box", "loss/mask", "samples_per_s", "data_wait"} <= set(joint)
    assert any(key.startswith("task/heatmap/") for key in joint)
    assert list((made[0] / "train" / "tensorboard").glob("events*"))


def test_the_report_scores_every_task(made):
    report = json.loads((made[0] / "evaluation" / "report.json").read_text())
    for name in (
        "box_AP50",
        "mask_AP50",
        "keypoint_AP",
        "refer_p50",
        "vqa_accuracy",
        "caption_attributes",
        "routing_accuracy",
    ):
        assert isinstance(report["metrics"][name], float), name


def test_labels_gallery_and_served_pictures_are_there(made):
    assert (made[0] / "labels" / "gallery.html").stat().st_size > 10_000
    assert json.loads((made[0] / "labels" / "coco" / "detect.json").read_text())["images"]
    for task in ("detect", "segment", "pose", "count", "ground", "refer", "vqa", "caption", "region_caption", "chat"):
        assert (made[0] / "served" / f"{task}.png").stat().st_size > 1000
        assert json.loads((made[0] / "served" / f"{task}.json").read_text())["task"] == task


def test_the_server_is_down_afterwards(made):
    with pytest.raises(urllib.error.URLError):
        post("http://127.0.0.1:8123/v1/caption", {})


def test_prepare_does_not_write_over_shards(made, capsys):
    assert cli.main(["prepare", "scenes", "--num", "4", "--output", str(made[0] / "shards" / "train")]) == 2
    assert "already" in capsys.readouterr().err
    assert (made[0] / "shards" / "train" / "manifest.json").is_file()
