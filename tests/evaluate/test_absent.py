"""Names of things that no image shows."""

import json

import numpy as np
import pytest
from support.evaluate_fakes import FakeEngine, write_split
from support.tiny_models import tiny_folder

from lumen_ray import cli
from lumen_ray.answer import Answer
from lumen_ray.data.scenes.render import scene_row
from lumen_ray.errors import UserError
from lumen_ray.evaluate.absent import AbsentNames
from lumen_ray.evaluate.run import evaluate
from lumen_ray.structures import Boxes, Prediction


def answer(**numbers):
    size = (8, 8)
    predictions = [
        Prediction(name, Boxes(np.tile([0, 0, 4, 4], (n, 1)), size), np.full(n, 0.5, np.float32))
        for name, n in numbers.items()
    ]
    return Answer("detect", size, predictions=predictions)


def test_every_box_is_wrong():
    absent = AbsentNames(["cat", "dog", "hat"])
    assert absent.evaluate() == {"absent_boxes_per_image": None, "absent_images_with_a_box": None}
    for found in (answer(cat=2, dog=0, hat=1), answer(cat=0, dog=0, hat=0), answer(cat=3, dog=0, hat=0)):
        absent.process(found)
    assert absent.evaluate() == {"absent_boxes_per_image": 2.0, "absent_images_with_a_box": pytest.approx(2 / 3)}
    assert list(absent.worst.items()) == [("cat", pytest.approx(5 / 3)), ("hat", pytest.approx(1 / 3))]
    assert absent.note == "for 3 names of absent classes there are 2.00 boxes per image, most often 'cat'"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), [scene_row(11, i, 96) for i in range(3)])


def test_the_splits_own_classes_are_left_out_and_others_asked_once(split, tmp_path):
    engine = FakeEngine([scene_row(11, i, 96) for i in range(3)])
    names = ["red circle", "bicycle", "bicycle ", "blue hat", "Red Circle"]
    report = evaluate(engine, split, tmp_path, tasks=["detect"], absent_classes=names)
    assert report["metrics"]["absent_boxes_per_image"] == 0.0
    assert report["settings"]["absent_classes"] == 2 and report["metrics"]["box_AP"] == pytest.approx(1)
    told = "for 2 names of absent classes there are 0.00 boxes per image; left out as classes of the split: red circle"
    assert report["notes"] == [f"{told}, Red Circle"]
    without = evaluate(engine, split, tmp_path, tasks=["detect"])
    assert "absent_boxes_per_image" not in without["metrics"] and not without["notes"]
    with pytest.raises(UserError, match="asked for by task detect"):
        evaluate(engine, split, tmp_path, tasks=["count"], absent_classes=names)
    with pytest.raises(UserError, match="all names of absent classes are classes of the split"):
        evaluate(engine, split, tmp_path, tasks=["detect"], absent_classes=["Red Circle"])


def test_the_command_takes_a_file_of_names(split, tmp_path, capsys):
    model = tiny_folder(tmp_path / "model")
    (tmp_path / "names.txt").write_text("bicycle\nblue hat\n")
    command = ["evaluate", "--model", str(model), "--shards", str(split), "--output", str(tmp_path / "out")]
    names = ["--tasks", "detect", "--absent-classes", str(tmp_path / "names.txt")]
    assert cli.main([*command, *names]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"]["absent_boxes_per_image"] is not None
    assert "for 2 names of absent classes" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("\n")
    assert cli.main([*command, *names]) == 2 and "is empty; write one class a line" in capsys.readouterr().err
