"""Label jobs with classes given by example."""

import json

import numpy as np
import pytest
from support.label_fakes import FakeEngine, encode, picture, write_images
from support.tiny_models import exemplar_folder, tiny_folder

import lumen_ray
from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example
from lumen_ray.label.pipeline import label
from lumen_ray.label.requests import build_requests

OPTIONS = {"num_actors": 0, "exports": ()}


def bolt(name="bolt", seed=0, box=(2, 3, 30, 40), **options):
    image = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return ClassByExample(name, [Example(list(box), image)], **options)


def asked(requests):
    return {r.task: (list(r.phrases), sorted(r.examples)) for r in requests}


def test_classes_by_example_take_the_place_of_their_names():
    found = build_requests(["detect", "pose", "caption"], ["nut", "bolt"], exemplars=[bolt("screw"), bolt()])
    assert asked(found) == {
        "detect": (["nut", "bolt", "screw"], ["bolt", "screw"]),
        "pose": (["nut", "bolt"], []),  # by name only
        "caption": ([], []),
    }
    assert asked(build_requests(["segment"], exemplars=[bolt()])) == {"segment": (["bolt"], ["bolt"])}


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["detect", "pose"], "task 'pose' takes classes by name only, and all are given by example"),
        (["caption"], "classes are given by example, but no task takes them"),
    ],
)
def test_tasks_that_take_no_examples(tasks, words):
    with pytest.raises(UserError, match=words):
        build_requests(tasks, exemplars=[bolt()])


def test_an_example_on_the_image_that_is_asked_about_is_refused(tmp_path):
    photos = write_images(tmp_path / "photos", 1)
    here = ClassByExample("bolt", [Example([0, 0, 4, 4])])
    with pytest.raises(UserError, match="class 'bolt' has an example without an image"):
        label(FakeEngine, photos, tmp_path / "out", tasks=["detect"], exemplars=[here], **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_examples_are_settings_of_the_job(tmp_path):
    photos, out = write_images(tmp_path / "photos", 2), tmp_path / "out"

    def run(*exemplars, folder=out):
        return label(FakeEngine, photos, folder, tasks=["detect"], classes=["nut"], exemplars=exemplars, **OPTIONS)

    assert run(bolt())["instances"] == {"detect": 4}
    job = json.loads((out / "job.json").read_text())
    (stored,) = job["exemplars"]
    assert (stored["name"], stored["named"]) == ("bolt", True)
    assert stored["examples"] == [{"box": [2.0, 3.0, 30.0, 40.0], "positive": True, "key": bolt().examples[0].key}]
    assert run(bolt())["finished_before"] == 2
    for other in ([bolt(seed=1)], [bolt(box=(2, 3, 30, 41))], [bolt(named=False)], []):
        with pytest.raises(UserError, match="made with other settings .exemplars was") as caught:
            run(*other)
        assert caught.value.reason == "other_settings"
    run(folder=tmp_path / "plain")
    assert "exemplars" not in json.loads((tmp_path / "plain" / "job.json").read_text())


def test_a_model_labels_by_example(tmp_path):
    photos, model = write_images(tmp_path / "photos", 2), exemplar_folder(tmp_path / "model")
    options = {"tasks": ["detect", "count"], "score_threshold": 0, "actors": 0}
    first = lumen_ray.label(photos, tmp_path / "a", model=model, exemplars=[bolt(named=False)], **options)
    assert first["errors"] == 0 and first["instances"]["detect"] > 0


def test_a_model_without_exemplars_refuses_them_before_the_work(tmp_path):
    photos, model = write_images(tmp_path / "photos", 1), tiny_folder(tmp_path / "model")
    with pytest.raises(UserError, match="class 'bolt' is given by example, which this model was not trained") as caught:
        label(model, photos, tmp_path / "out", tasks=["detect"], exemplars=[bolt()], **OPTIONS)
    assert caught.value.reason == "no_exemplars" and not (tmp_path / "out").exists()


def test_the_command_reads_a_file(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "lumen_ray.label.pipeline.label",
        lambda *_, **options: calls.append(options) or {"images": 0, "labelled": 0, "errors": 0, "first_error": None},
    )
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    file = tmp_path / "parts.yaml"
    file.write_text("classes: [{name: bolt, examples: [{image: a.png, box: [1, 2, 30, 40]}]}]")
    command = ["label", "x", "--output", str(tmp_path), "--exemplars", str(file)]
    assert cli.main(command) == cli.main([*command, "--classes", "nut"]) == 0
    alone, beside = calls
    assert [shown.name for shown in alone["exemplars"]] == ["bolt"] and alone["classes"] is None
    assert beside["classes"] == ["nut"]
    file.write_text("classes: []")
    assert cli.main(command) == 2
    assert "it has no classes" in capsys.readouterr().err
