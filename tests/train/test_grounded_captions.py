"""A model that learned scenes with grounded captions writes them, with the objects in the order of the text."""

import json
import shutil

import pytest
import yaml
from support.tiny_models import SIDE, tiny_settings
from support.train_fakes import job_of, log_of

from lumen_ray.data.images import decode
from lumen_ray.data.scenes.text import GROUNDED_CAPTION
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.shards import read_rows
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Boxes
from lumen_ray.train.launch import train_local

SEED = 0
STAGE = {
    "steps": 150, "lr": 0.004, "warmup_steps": 10,
    "groups": [{"tasks": ["chat", "detect"]}],
    "branches": {"negatives": 1, "max_messages": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(rows of two scenes, the run that learned them)."""
    folder = tmp_path_factory.mktemp("links")
    source = ScenesSource(2, seed=SEED, side=SIDE, grounded_captions=True)
    prepare_source(folder / "shards", source, rows_per_group=2, workers=0)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(vocab_size=330).model_dump(mode="json")))
    train_local(job_of(folder, folder / "run", STAGE, batch_size=2))
    return list(read_rows(folder / "shards")), folder / "run"


def grounded(row):
    """(text, boxes) of the pieces of a scene's grounded caption."""
    (message,) = (m for m in row["messages"] if m["turns"][0]["content"] == GROUNDED_CAPTION)
    found = [[row["instances"][i]["box"] for i in link["instances"]] for link in message["links"]]
    return message["turns"][1]["content"].split(" [DET]"), found


def test_it_writes_the_captions_with_their_objects(trained):
    rows, run = trained
    losses = [line["loss/lm"] for line in log_of(run)]
    assert losses[-1] < 0.1 * losses[0]
    engine = Engine.load(run / "model")
    request = make_request("chat", text=GROUNDED_CAPTION)
    answers = engine.run([decode(row["image"]) for row in rows], [[request]] * 2, score_threshold=0.3)
    for row, (answer,) in zip(rows, answers, strict=True):
        texts, boxes = grounded(row)
        assert answer.text == "".join(texts) and not answer.is_cut
        assert [part.text for part in answer.parts if part.route is None] == texts
        assert [part.route for part in answer.parts] == [None, "[DET]"] * len(boxes) + [None]
        for prediction, expected in zip(answer.predictions, boxes, strict=True):
            overlap = prediction.boxes.iou(Boxes(expected, (SIDE, SIDE)))
            assert overlap.shape == (len(expected),) * 2 and overlap.max(0).min() > 0.7
            assert prediction.phrase in answer.text
    assert len(answers[0][0].predictions) == 3
    # an instruction is routed as before
    ((routed,),) = engine.run([decode(rows[0]["image"])], [[make_request("chat", text="detect red triangle")]])
    assert (routed.parts, routed.text, routed.route) == (None, None, "[DET]")


def test_a_folder_without_the_flag_ends_answers_at_their_routing_token(trained, tmp_path):
    rows, run = trained
    shutil.copytree(run / "model", tmp_path / "model")
    meta = json.loads((run / "model" / "meta.json").read_text())
    assert meta.pop("writes_behind_routes") is True
    (tmp_path / "model" / "meta.json").write_text(json.dumps(meta))  # as of a folder from before there was one
    engine = Engine.load(tmp_path / "model")
    request = make_request("chat", text=GROUNDED_CAPTION)
    ((answer,),) = engine.run([decode(rows[0]["image"])], [[request]])
    assert answer.parts is None and answer.text == grounded(rows[0])[0][0] and len(answer.predictions) == 1


def test_training_sets_the_flag_where_it_draws_messages_with_links(trained, data, tmp_path):
    folder = trained[1].parent

    def flag(run, where=folder, **options):
        groups = [{"tasks": tasks} for tasks in options.pop("groups")]
        return job_of(where, tmp_path / run, {**STAGE, "groups": groups}, **options).job.meta.writes_behind_routes

    sequential = {"prompt_layout": "sequential", "prefix_attention": "causal", "link_reads_words": False}
    settings = tiny_settings(vocab_size=330, **sequential)
    (tmp_path / "sequential.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    with pytest.raises(UserError, match="need prompt_layout 'branches'"):
        flag("sequential", groups=[["chat", "detect"]], model=str(tmp_path / "sequential.yaml"))
    assert flag("both", groups=[["vqa"], ["chat", "segment"]])
    assert not flag("apart", groups=[["chat"], ["detect"]])
    assert not flag("without", data, groups=[["chat", "detect"]])
    assert flag("later", data, groups=[["detect"]], init_from=str(trained[1] / "model"))
