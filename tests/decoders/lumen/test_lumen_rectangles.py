"""The light decoder on an input that is not square: what it learns there comes back in the stored image's frame."""

import numpy as np
import pytest
import torch

from lumen_ray.decoders.base import PredictSettings, PromptSpec
from lumen_ray.decoders.lumen.decoder import LumenDecoder
from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.structures import Boxes
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, PerceptionTargets

DENSE, LINK = 10, 8
BOXES = {(32, 96): [60.0, 4, 90, 28], (96, 32): [4.0, 60, 28, 90]}  # where a square of the shorter side has no place
CORNER = {(32, 96): [86.0, 8], (96, 32): [8.0, 86]}


def ellipse(box, shape, step):
    """bool [H / step, W / step]."""
    y, x = ((np.arange(side // step) + 0.5) * step for side in shape)
    cx, cy, rx, ry = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    return ((x - cx) / rx)[None] ** 2 + ((y - cy) / ry)[:, None] ** 2 <= 1


@pytest.mark.parametrize("shape", BOXES, ids=str)
def test_one_object_is_learned_and_detected_in_the_stored_image(shape):
    torch.manual_seed(0)
    box, grid = BOXES[shape], (shape[0] // 4, shape[1] // 4)
    model = LumenDecoder(LumenSettings(hidden_size=16, num_heads=2, num_layers=1), DENSE, LINK)
    targets = PerceptionTargets(
        boxes=torch.tensor([[box], [box]]),
        valid=torch.tensor([[True], [True]]),
        crowd=torch.zeros(2, 1, dtype=torch.bool),
        mask_index=torch.tensor([[0], [-1]]),
        masks=torch.tensor(ellipse(box, shape, 4)[None], dtype=torch.uint8) * 255,
        keypoints=torch.tensor([[[0.0, 0, 0]], [[*CORNER[shape], 2]]]),
        counted=torch.tensor([True, False]),
    )
    texture = np.random.default_rng(0).normal(size=(DENSE - 1, *grid))
    dense = torch.tensor(np.concatenate([ellipse(box, shape, 4)[None], texture]), dtype=torch.float32)[None]
    link = SuperLink("lumen", torch.randn(2, LINK), torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(120):
        total = sum(t.total / t.count.clamp_min(1) for t in model.loss(model(link, dense), targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    size = (shape[0] * 3, shape[1] * 3 - 5)  # the width is less than what fits
    frame = Frame.fit(size, shape)
    with torch.no_grad():
        specs = [PromptSpec("thing", masks=True, keypoints=("corner",)), None]
        found = model.eval().predict(model(link, dense), [frame], specs, PredictSettings(0.4))[0]
    assert len(found) == 1 and frame.scale == pytest.approx(1 / 3)
    wanted = np.array([box]) / frame.scale
    assert found.boxes.iou(Boxes(wanted, size))[0, 0] > 0.7
    mask = ellipse(wanted[0], (shape[0] * 3, shape[1] * 3), 1)[:, : size[1]]
    predicted = found.masks.to_arrays()[0]
    assert predicted.shape == size
    assert (predicted & mask).sum() / (predicted | mask).sum() > 0.7
    assert np.abs(found.keypoints.xyv[0, 0, :2] - np.array(CORNER[shape]) / frame.scale).max() < 12
