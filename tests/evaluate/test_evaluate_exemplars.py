"""Evaluation of classes that are asked for by example."""

import numpy as np
import pytest
from support.evaluate_fakes import POSED, FakeEngine, write_split
from support.label_fakes import encode, picture
from support.tiny_models import SIDE, exemplar_folder, tiny_folder

import lumen_ray
from lumen_ray import cli
from lumen_ray.data.scenes.render import scene_row
from lumen_ray.data.scenes.text import CLASSES
from lumen_ray.errors import UserError
from lumen_ray.evaluate.run import evaluate
from lumen_ray.exemplars import ClassByExample, Example

NAME = "red circle"
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def shown(name=NAME, image=IMAGE):
    return ClassByExample(name, [Example([2, 3, 30, 40], image)])


@pytest.fixture(scope="module")
def rows():
    return [scene_row(11, i, 96) for i in range(3)]


@pytest.fixture(scope="module")
def split(rows, tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), rows)


class Recorder(FakeEngine):
    """Records the requests."""

    def run(self, images, requests, **options):
        self.requests = [request for mine in requests for request in mine] + getattr(self, "requests", [])
        return super().run(images, requests, **options)


def test_detect_segment_and_count_ask_by_example(split, rows, tmp_path):
    engine = Recorder(rows, skeletons=POSED)
    report = evaluate(engine, split, tmp_path, exemplars=[shown()])
    assert report["settings"]["exemplars"] == [NAME]
    by_task = {}
    for request in engine.requests:
        if NAME in request.phrases:
            by_task.setdefault(request.task, set()).update(request.examples)
        else:
            assert not request.examples
    assert {task for task, names in by_task.items() if names == {NAME}} == {"detect", "segment", "count"}
    plain = evaluate(FakeEngine(rows, skeletons=POSED), split, tmp_path / "plain")
    assert "exemplars" not in plain["settings"] and plain["metrics"] == report["metrics"]


@pytest.mark.parametrize(
    ("exemplars", "tasks", "words"),
    [
        (
            [shown("red circel")],
            None,
            "the split has no such class; did you mean 'red circle'? its classes: red",
        ),
        ([shown(image=None)], None, "class 'red circle' has an example without an image"),
        ([shown()], ["caption"], "which only detect, segment, count ask for"),
        ([shown(), shown()], None, "class 'red circle' is given twice"),
    ],
)
def test_examples_that_cannot_be_asked_for(split, rows, tmp_path, exemplars, tasks, words):
    assert CLASSES[0] == NAME
    with pytest.raises(UserError) as caught:
        evaluate(FakeEngine(rows), split, tmp_path / "out", exemplars=exemplars, tasks=tasks)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_is_scored_on_a_file(tmp_path, capsys):
    rows = [scene_row(3, i, SIDE) for i in range(2)]
    split, file = write_split(tmp_path / "split", rows), tmp_path / "parts.yaml"
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    file.write_text(f"classes: [{{name: {NAME}, named: false, examples: [{{image: a.png, box: [1, 2, 30, 40]}}]}}]")
    options = {"tasks": ["detect", "count"], "exemplars": file, "device": "cpu"}
    report = lumen_ray.evaluate(exemplar_folder(tmp_path / "model"), split, tmp_path / "out", **options)
    assert report["scored"] == 2 and report["settings"]["exemplars"] == [NAME]
    named = lumen_ray.evaluate(
        exemplar_folder(tmp_path / "model"), split, tmp_path / "named", **options | {"exemplars": None}
    )
    scores = [(tmp_path / name / "predictions.parquet").read_bytes() for name in ("out", "named")]
    assert named["scored"] == 2 and scores[0] != scores[1]
    with pytest.raises(UserError, match="class 'red circle' is given by example, which this model was not trained"):
        lumen_ray.evaluate(tiny_folder(tmp_path / "words"), split, tmp_path / "words-out", **options)
    command = [
        "evaluate",
        "--model",
        str(tmp_path / "model"),
        "--shards",
        str(split),
        "--output",
        str(tmp_path / "cli"),
    ]
    assert cli.main([*command, "--tasks", "detect", "--device", "cpu", "--exemplars", str(file)]) == 0
    assert cli.main([*command, "--exemplars", str(tmp_path / "none.yaml")]) == 2
    assert "exemplar file" in capsys.readouterr().err
