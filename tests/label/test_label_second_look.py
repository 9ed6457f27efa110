"""Jobs that look at their instances a second time: a second decoder's agreement, and the LLM's yes or no."""

import json

import numpy as np
import pytest
from support.label_fakes import EncodingFake, FakeEngine, encode, picture, write_images
from support.tiny_models import EXPERTS, answering, tiny_loaded
from test_label_pipeline import read_labels

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.inference.tiles import Tiles
from lumen_ray.label.pipeline import label
from lumen_ray.model.build import save_model

OPTIONS = {"classes": ["square"], "num_actors": 0, "fragment_size": 4, "batch_size": 3, "exports": ()}
TASKS = ["detect", "segment", "pose", "caption"]
SHIFTED = (20 - 5) / (20 + 5)  # IoU of the square with itself 5 pixels further right


def by_task(output, name):
    return {row["task"]: row[name] for row in read_labels(output) if row["image_id"] == "image001.png"}


def test_agreement_and_verification_are_recorded(tmp_path):
    photos = write_images(tmp_path / "photos", 3)
    engine = EncodingFake()
    label(lambda: engine, photos, tmp_path / "out", tasks=TASKS, agree_with="second", verify=True, **OPTIONS)
    assert engine.encoded == 3
    wanted = pytest.approx(SHIFTED)
    assert by_task(tmp_path / "out", "agreement") == {
        "detect": wanted,
        "segment": wanted,
        "pose": None,
        "caption": None,
    }
    assert by_task(tmp_path / "out", "verified") == {"detect": 1, "segment": 1, "pose": 1, "caption": None}
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert (job["agree_with"], job["verify"]) == ("second", True)
    settings = json.loads(read_labels(tmp_path / "out")[0]["provenance"])["settings"]
    assert (settings["agree_with"], settings["verify"]) == ("second", True)
    with pytest.raises(UserError, match="agree_with was"):
        label(EncodingFake, photos, tmp_path / "out", tasks=TASKS, verify=True, **OPTIONS)


def test_without_a_second_look_nothing_is_recorded(tmp_path):
    photos = write_images(tmp_path / "photos", 1)
    label(EncodingFake, photos, tmp_path / "out", tasks=["detect"], **OPTIONS)
    (row,) = read_labels(tmp_path / "out")
    assert row["agreement"] is None and row["verified"] is None
    assert not {"agree_with", "verify"} & set(json.loads((tmp_path / "out" / "job.json").read_text()))


def test_instances_in_tiles_are_looked_at_in_their_tiles(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "image001.png").write_bytes(encode(picture(1, (48, 120))))
    engine = EncodingFake()
    label(
        lambda: engine, tmp_path / "photos", tmp_path / "out", tasks=["detect"], tiles=Tiles(48), agree_with="second",
        verify=True, **OPTIONS,
    )  # fmt: skip
    assert engine.encoded == 1 + len(Tiles(48).windows((48, 120)))
    (row,) = read_labels(tmp_path / "out")
    assert row["agreement"] == pytest.approx(SHIFTED) and row["verified"] == 1


def test_an_engine_that_encodes_nothing_is_refused(tmp_path):
    photos = write_images(tmp_path / "photos", 1)
    with pytest.raises(UserError, match="agree_with and verify are not to be had"):
        label(FakeEngine, photos, tmp_path / "out", tasks=["detect"], verify=True, **OPTIONS)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    loaded = answering(tiny_loaded(**{name: EXPERTS[name] for name in ("grounding_dino", "unipose")}))
    return save_model(folder, loaded.model.state_dict(), loaded.settings, loaded.tokenizer, loaded.meta)


@pytest.mark.parametrize(
    ("decoder", "tasks", "message"),
    [
        ("dino", ["detect"], "which the model does not have; its decoders: lumen, grounding_dino, unipose"),
        ("lumen", ["detect"], "answers detect itself; give another decoder .grounding_dino"),
        ("unipose", ["segment", "caption"], "can serve none of the tasks; it can serve: "),
    ],
)
def test_a_decoder_that_cannot_be_asked(tmp_path, experts, decoder, tasks, message):
    photos = write_images(tmp_path / "photos", 1)
    with pytest.raises(UserError, match=message):
        label(experts, photos, tmp_path / "out", tasks=tasks, agree_with=decoder, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_two_decoders_of_a_model(tmp_path, experts, capsys):
    """By the command line: random weights find something at a threshold of 0."""
    photos = write_images(tmp_path / "photos", 2)
    arguments = ["label", str(photos), "--model", str(experts), "--tasks", "segment,pose,caption", "--classes",
                 "red figure", "--score-threshold", "0", "--agree-with", "grounding_dino", "--verify", "--actors", "0",
                 "--export", "none", "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0, capsys.readouterr()
    rows = [row for row in read_labels(tmp_path / "out") if row["box"] is not None]
    found = {task: [row for row in rows if row["task"] == task] for task in ("segment", "pose")}
    assert found["segment"] and found["pose"]
    agreement = np.array([row["agreement"] for row in found["segment"]])
    assert agreement.min() >= 0 and agreement.max() <= 1 and len(set(agreement.tolist())) > 1
    assert {row["agreement"] for row in found["pose"]} == {None}  # Grounding DINO has no keypoints
    verified = np.array([row["verified"] for row in rows])
    assert verified.min() > 0 and verified.max() < 1
