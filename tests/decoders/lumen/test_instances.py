"""Masks and keypoints of many instances are computed together, in parts of a bounded size."""

import numpy as np
import pytest

from lumen_ray.data.scenes.render import render
from lumen_ray.decoders.lumen import instances
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request


@pytest.fixture(scope="module")
def engine():
    return Engine.load("nano")


def answers(engine):
    images = [render(40_000, n).image for n in range(6)]
    posed = [name for name in engine.classes if name in engine.skeletons]
    requests = [make_request("segment", classes=engine.classes), make_request("pose", classes=posed)]
    return [p for a in engine.run(images, [requests] * 6, score_threshold=0.2) for x in a for p in x.predictions]


def test_the_size_of_the_parts_changes_nothing(engine, monkeypatch):
    together = answers(engine)
    monkeypatch.setattr(instances, "MASKS_AT_ONCE", 2)
    monkeypatch.setattr(instances, "KEYPOINTS_AT_ONCE", 6)
    apart = answers(engine)
    assert sum(map(len, together)) > 12 and sum(len(p) for p in together if p.keypoints is not None) > 2
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy)
        if one.masks is not None:
            assert one.masks.rles == other.masks.rles and len(one.masks) == len(one)
        if one.keypoints is not None:
            np.testing.assert_allclose(one.keypoints.xyv, other.keypoints.xyv, atol=1e-3)
