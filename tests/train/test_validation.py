"""Validation during training: the weights that would be exported are scored, and the best of them kept."""

import json
import shutil

import pytest
import torch
from support.ranks import Moment, run_ranks
from support.train_fakes import cut_after, log_of, weights_of
from support.validation_fakes import Scripted

from lumen_ray.errors import UserError
from lumen_ray.evaluate.during_training import validator_of
from lumen_ray.inference.engine import Engine
from lumen_ray.model.build import load_model, open_weights, read_meta
from lumen_ray.recipe import Recipe
from lumen_ray.train.launch import prepare_job, train_local
from lumen_ray.train.run import checkpoint
from lumen_ray.train.validation import BEST, Scores

EMA = {"decay": 0.8}
GROUP = [{"tasks": ["detect", "caption"]}]


def recipe_of(data, **changes):
    stage = {"name": "s", "steps": 6, "warmup_steps": 2, "groups": GROUP}
    settings = {"name": "tiny", "model": str(data / "tiny.yaml"), "batch_size": 8, "checkpoint_every": 2, "ema": EMA}
    return Recipe.model_validate(settings | {"stages": [stage]} | changes)


def with_split(data, **changes):
    return {"shards": str(data / "shards"), "every": 2, "samples": 3} | changes


def job_with(data, run, **changes):
    """A run that validates with the package's own scores."""
    recipe = recipe_of(data, **changes)
    return prepare_job(data / "shards", recipe, run, None, validator_of(recipe))


def scripted_job(data, run, values, **changes):
    lower, seen = changes.pop("lower_is_better", False), changes.pop("seen", None)
    validator = Scripted(values, lower_is_better=lower, seen=seen)
    return prepare_job(data / "shards", recipe_of(data, **changes), run, None, validator)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The same run without validation."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train_local(prepare_job(data / "shards", recipe_of(data), run))
    return run


@pytest.fixture(scope="module")
def validated(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("validated") / "run"
    train_local(job_with(data, run, validation=with_split(data)))
    return run


def test_the_metrics_of_the_split_are_logged(validated):
    lines = {line["step"]: line for line in log_of(validated)}
    scored = [step for step, line in lines.items() if "validation/seconds" in line]
    assert scored == [1, 3, 5]
    assert {"validation/box_AP", "validation/box_AP50", "validation/caption_attributes"} <= lines[5].keys()
    assert lines[1]["validation/best"] == 1.0
    report = json.loads((validated / "validation" / "report.json").read_text())
    assert report["images"] == 3 and {*report["tasks"]} == {"detect", "caption"}
    best = read_meta(validated / BEST)
    assert best.validation["metric"] == "box_AP"
    assert best.validation["value"] == pytest.approx(max(lines[s]["validation/box_AP"] for s in scored), abs=1e-5)
    assert best.steps == best.validation["step"] in (2, 4, 6)
    load_model(validated / BEST)


def test_training_is_the_same_to_the_bit(plain, validated):
    one, two = weights_of(plain), weights_of(validated)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [line["loss"] for line in log_of(plain)] == [line["loss"] for line in log_of(validated)]


def test_the_scores_are_those_of_evaluate(data, validated, tmp_path):
    """The last validation is of the weights that were exported."""
    from lumen_ray.evaluate.run import evaluate

    report = evaluate(Engine.load(validated / "model"), data / "shards", tmp_path, tasks=["detect", "caption"], limit=3)
    last = log_of(validated)[-1]
    for name in ("box_AP", "box_AP50", "box_IL_MCC", "caption_attributes"):
        assert last[f"validation/{name}"] == pytest.approx(report["metrics"][name], abs=1e-5)


def test_two_ranks_validate_what_one_does(data, tmp_path):
    values = {2: 0.5, 4: 0.9, 6: 0.7}
    train_local(scripted_job(data, tmp_path / "one", values, seen=tmp_path / "seen-one"))
    assert run_ranks(scripted_job(data, tmp_path / "two", values, seen=tmp_path / "seen-two", workers=2)) == [0, 0]
    one, two = (
        [json.loads(line) for line in (tmp_path / f"seen-{n}").read_text().splitlines()] for n in ("one", "two")
    )
    assert one == [[step, pytest.approx(norm, rel=1e-5)] for step, norm in two] and len(one) == 3
    for run in ("one", "two"):
        best = read_meta(tmp_path / run / BEST)
        assert best.validation == {"metric": "m", "value": 0.9, "step": 4} and best.steps == 4
    kept = [dict(open_weights(tmp_path / run / BEST)) for run in ("one", "two")]
    assert all(torch.allclose(kept[0][name], kept[1][name], atol=1e-3) for name in kept[0])


@pytest.mark.parametrize(
    ("value", "best", "lower", "beats"),
    [(0.5, None, False, True), (0.9, 0.9, False, False), (0.9, 0.5, False, True), (0.9, 0.5, True, False),
     (0.1, 0.5, True, True), (None, None, False, False), (None, 0.5, False, False)],
)  # fmt: skip
def test_which_scores_are_better(value, best, lower, beats):
    assert Scores({} if value is None else {"m": value}, "m", lower).beats(best) == beats


def test_the_best_so_far_survives_a_kill(data, tmp_path):
    """While a better one replaces it: the repeated step writes the same again."""
    values = {2: 0.5, 4: 0.9, 6: 0.1}
    whole, run = tmp_path / "whole", tmp_path / "killed"
    train_local(scripted_job(data, whole, values))
    moving = f"{BEST}/.partial/model.safetensors {run}/{BEST}/model.safetensors"
    assert run_ranks(scripted_job(data, run, values), 1, Moment(0, moving, 2)) == [-9]
    assert checkpoint.start_step(checkpoint.latest(run)) == 2
    train_local(scripted_job(data, run, values))
    assert read_meta(run / BEST) == read_meta(whole / BEST) and read_meta(run / BEST).steps == 4
    one, two = (dict(open_weights(folder / BEST)) for folder in (run, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_compares_with_the_best_before(data, tmp_path):
    run = tmp_path / "run"
    train_local(scripted_job(data, run, {2: 0.9, 4: 0.5, 6: 0.8}))
    cut_after(run, 4)
    train_local(scripted_job(data, run, {2: 0.0, 4: 0.0, 6: 0.8}))
    assert read_meta(run / BEST).validation == {"metric": "m", "value": 0.9, "step": 2}
    shutil.rmtree(run / "checkpoints")  # another run in the same folder: its best model has nothing to do with this one
    train_local(scripted_job(data, run, {2: 0.1, 4: 0.2, 6: 0.1}))
    assert read_meta(run / BEST).validation == {"metric": "m", "value": 0.2, "step": 4}


def test_an_error_of_the_scores_ends_all_ranks(data, tmp_path):
    assert run_ranks(scripted_job(data, tmp_path / "run", {2: 0.1}, workers=2), together=False) == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message", "reason"),
    [
        ({"shards": None}, "names no held-out split; give its shard folder with --validate", "no_split"),
        ({"shards": "/nowhere"}, "'/nowhere' does not exist", "not_shards"),
        ({"tasks": ["detct"]}, "unknown task 'detct'; did you mean 'detect'?", "unknown_task"),
        ({"tasks": ["edit"]}, "the split is not annotated for edit", "nothing_to_evaluate"),
        ({"metric": "box_PA"}, "validation has no metric 'box_PA'; did you mean 'box_AP'?", "unknown_metric"),
        ({"metric": "mask_AP"}, "validation has no metric 'mask_AP'", "unknown_metric"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_the_start(data, tmp_path, settings, message, reason):
    with pytest.raises(UserError) as error:
        job_with(data, tmp_path / "run", validation=with_split(data) | settings)
    assert message in str(error.value) and error.value.reason == reason
    assert "\n" not in str(error.value)


def test_the_metric_may_be_written_in_small_letters(data, tmp_path):
    job = job_with(data, tmp_path / "run", validation=with_split(data, metric="box_ap50")).job
    assert job.validator._metric(["detect", "caption"]) == "box_AP50"
