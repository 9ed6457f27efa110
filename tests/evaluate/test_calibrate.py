"""Fitting scores to a labelled split."""

import numpy as np
import pytest
from scipy.special import expit, logit
from support.serve_fakes import save_random_model

from lumen_ray import calibrate, evaluate, prepare
from lumen_ray.errors import UserError
from lumen_ray.evaluate.calibrate import fit_curve
from lumen_ray.evaluate.calibration import Reliability
from lumen_ray.model.build import read_meta


def sample(number, slope, shift, seed=0):
    """Scores, and hits as often as the curve says."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.05, 0.95, number)
    return scores, rng.random(number) < expit(slope * logit(scores) + shift)


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (3.0, -1.0), (0.4, 0.8)])
def test_the_curve_that_made_the_hits_is_found(slope, shift):
    scores, hits = sample(40_000, slope, shift)
    curve = fit_curve(scores, hits, [""] * len(scores))
    assert curve.slope == pytest.approx(slope, rel=0.06) and curve.shift == pytest.approx(shift, abs=0.06)
    assert curve.classes == {}
    fresh, right = sample(40_000, slope, shift, seed=1)
    assert Reliability.of(curve(fresh, ""), right).error < 0.02


def test_a_class_with_many_instances_has_its_own_shift():
    scores, hits = sample(6000, 2.0, 0.0)
    others, other_hits = sample(3000, 2.0, 1.5, seed=1)
    few, few_hits = sample(30, 2.0, -3.0, seed=2)
    names = ["cat"] * 6000 + ["dog"] * 3000 + ["owl"] * 30
    curve = fit_curve(np.concatenate([scores, others, few]), np.concatenate([hits, other_hits, few_hits]), names)
    assert set(curve.classes) == {"cat", "dog"}
    assert curve.classes["dog"] - curve.classes["cat"] == pytest.approx(1.5, abs=0.25)


def test_few_instances_that_their_scores_tell_apart_give_no_step():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.uniform(0.05, 0.4, 10), rng.uniform(0.6, 0.95, 200)])
    curve = fit_curve(scores, scores > 0.5, [""] * 210)
    calibrated = curve(scores, "")
    assert curve.slope < 8 and abs(curve.shift) < 3
    assert len(np.unique(calibrated)) > 200 and calibrated.max() < 0.99999
    assert calibrated[:10].max() < 0.5 < calibrated[10:].min()


def test_without_right_or_wrong_instances_there_is_no_curve():
    scores, hits = sample(200, 1.0, 0.0)
    assert fit_curve(scores, np.ones(200, bool), [""] * 200) is None
    assert fit_curve(scores[:10], hits[:10], [""] * 10) is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for name, seed, number in (("calibration", 5, 320), ("held-out", 6, 128)):  # wrong instances are rare
        prepare("scenes", folder / name, num=number, seed=seed, workers=0)
    return folder


def test_held_out_scenes_are_calibrated_afterwards(shards, tmp_path):
    tasks = ["detect", "count"]
    before = evaluate("nano", shards / "held-out", tmp_path / "before", tasks=tasks)["metrics"]
    fits = calibrate("nano", shards / "calibration", output=tmp_path / "model", tasks=tasks)
    assert set(fits) == set(tasks) and all(fit.after < fit.before for fit in fits.values())
    after = evaluate(tmp_path / "model", shards / "held-out", tmp_path / "after", tasks=tasks)["metrics"]
    assert after["box_ECE"] < 0.05 < before["box_ECE"]
    assert after["count_ECE"] < before["count_ECE"]
    assert after["box_AP50"] == pytest.approx(before["box_AP50"], abs=0.003)
    # once more: curves are of the decoders' own scores, not of those that are calibrated
    assert fits["detect"].right < fits["detect"].instances
    again = calibrate(tmp_path / "model", shards / "calibration", tasks=["detect"])
    one, other = again["detect"].curve, fits["detect"].curve
    assert [one.slope, one.shift] == pytest.approx([other.slope, other.shift], rel=1e-3)
    assert one.classes == pytest.approx(other.classes, rel=1e-3)
    assert set(read_meta(tmp_path / "model").calibration) == {"detect"}


def test_mistakes_are_a_sentence(shards, tmp_path):
    def reason(*args, **kwargs):
        with pytest.raises(UserError) as error:
            calibrate(*args, **kwargs)
        return error.value.reason

    split = shards / "calibration"
    assert reason("nano", split) == "usage"
    assert reason("nano", split, output=tmp_path) == "output_exists"
    assert reason("nano", split, output=tmp_path / "a", tasks=["caption"]) == "invalid_setting"
    assert reason("nano", split, output=tmp_path / "a", limit=1) == "too_few_instances"
    assert not (tmp_path / "a").exists()
    blank = save_random_model(tmp_path / "blank")
    assert reason(blank, split, tasks=["detect"], limit=4) == "too_few_instances"
    assert read_meta(blank).calibration == {}
