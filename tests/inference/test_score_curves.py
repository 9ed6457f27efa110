"""Calibrated scores of decoders, and thresholds that are of calibrated scores."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_folder, tiny_loaded

from lumen_ray.errors import UserError
from lumen_ray.inference.calibration import Calibration, Curve
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import load_model, read_meta, write_meta

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
CURVE = {"decoder": "lumen", "slope": 2.0, "shift": 1.5, "classes": {"blue square": -0.5}}

curves = st.builds(
    Curve, st.floats(0.05, 20), st.floats(-8, 8), st.dictionaries(st.sampled_from("ab"), st.floats(-8, 8))
)


@settings(max_examples=100, deadline=None)
@given(curves, st.floats(0, 0.99), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.sampled_from("abc"))
@example(Curve(0.119, 4.65), 0.98927176, [0.2581302], "a")
def test_a_threshold_of_calibrated_scores_loses_none(curve, threshold, scores, phrase):
    scores = np.sort(np.array(scores, np.float32))
    calibrated = curve(scores, phrase)
    for score in calibrated:  # of thresholds those that a score meets exactly are the hardest
        assert (scores[calibrated >= score] >= curve.raw(float(score), phrase)).all()
    assert (np.diff(calibrated) >= 0).all() and ((calibrated >= 0) & (calibrated <= 1)).all()
    assert (scores[calibrated >= np.float32(threshold)] >= curve.raw(threshold, phrase)).all()


def test_a_slope_of_one_without_shift_changes_nothing():
    scores = np.linspace(0.01, 0.99, 20, dtype=np.float32)
    np.testing.assert_allclose(Curve()(scores, "a"), scores, atol=1e-6)
    assert Curve().raw(0.3, "a") == pytest.approx(0.3, abs=1e-5)
    assert Curve(3.0, 1.0).raw(0.0, "a") == 0.0


def engine(calibration):
    loaded = tiny_loaded()
    loaded.meta.calibration = calibration
    return Engine(loaded)


@pytest.mark.parametrize("threshold", [0.0, 0.004, 0.02, 0.2])
def test_answers_have_calibrated_scores_above_the_threshold(threshold):
    requests = [
        make_request("detect", classes=["red circle", "blue square"]),
        make_request("segment", classes=["red circle"]),
    ]
    ((raw, raw_masks),) = engine({}).run([IMAGE], [requests], score_threshold=0.0)
    ((found, masks),) = engine({"detect": CURVE}).run([IMAGE], [requests], score_threshold=threshold)
    curve = Curve(**CURVE)
    for one, other in zip(found.predictions, raw.predictions, strict=True):
        expected = curve(other.scores, other.phrase)
        kept = expected >= threshold
        np.testing.assert_allclose(one.scores, expected[kept], atol=1e-5)
        np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy[kept], atol=1e-3)
    kept = raw_masks.predictions[0].scores >= threshold  # a task without a curve
    np.testing.assert_allclose(masks.predictions[0].scores, raw_masks.predictions[0].scores[kept], atol=1e-6)


def test_semantic_answers_use_the_curve_of_the_masks_they_are_made_of():
    calibration = Calibration({"segment": Curve(decoder="lumen")})
    assert calibration.curve("semantic", "lumen") is not None
    assert calibration.curve("detect", "lumen") is None
    assert calibration.curve("segment", "grounding_dino") is None  # whose scores are others


def test_curves_are_kept_in_the_model_folder(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    meta = read_meta(folder)
    assert meta.calibration == {}
    meta.calibration = Calibration.from_dict({"detect": CURVE}).to_dict()
    write_meta(folder, meta)
    assert load_model(folder).meta.calibration == {"detect": CURVE}
    calibrated = load_model(folder).version
    meta.calibration = {}
    write_meta(folder, meta)
    assert len(calibrated) == 12 and calibrated != load_model(folder).version
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.yaml", "meta.json", "model.safetensors", "tokenizer.json"]
    )
    meta.calibration = {"detect": {"decoder": "lumen", "slope": -1.0, "shift": 0.0, "classes": {}}}
    write_meta(folder, meta)
    with pytest.raises(UserError, match="run 'lumen-ray calibrate' again"):
        Engine.load(folder).run([IMAGE], [[make_request("detect", classes=["a"])]])
