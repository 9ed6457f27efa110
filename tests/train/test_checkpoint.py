"""Checkpoints appear complete or not at all."""

import json

import pytest
import torch
from tiny_models import scrambled, tiny_model

from lumen_ray.errors import UserError
from lumen_ray.train import checkpoint


def save(run, step, stage="s0", model=None):
    model = model or tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    return checkpoint.save(run, {"step": step, "stage": stage, "preset": "tiny"}, model, optimizer)


def test_the_weights_come_back(tmp_path):
    model, other = scrambled(tiny_model()), tiny_model(seed=3)
    path = save(tmp_path, 4, model=model)
    assert path.name == "0000004-s0"
    checkpoint.load_weights(path, other)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_the_newest_complete_one_is_taken(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    old, new = save(tmp_path, 9), save(tmp_path, 10, "s1")
    assert checkpoint.latest(tmp_path) == new
    new.rename(new.with_name(new.name + ".partial"))  # a kill before the rename
    assert checkpoint.latest(tmp_path) == old
    torn = tmp_path / "checkpoints" / "0000011-s1"
    torn.mkdir()
    assert checkpoint.latest(tmp_path) == old
    assert checkpoint.position(old) == {"step": 9, "stage": "s0", "preset": "tiny"}
    assert save(tmp_path, 10, "s1") == checkpoint.latest(tmp_path)  # the leftover of the kill is no obstacle


def test_another_preset_is_refused(tmp_path):
    path = save(tmp_path, 1)
    checkpoint.check_preset(path, "tiny")
    with pytest.raises(UserError, match="of preset 'tiny', not 'nano'") as error:
        checkpoint.check_preset(path, "nano")
    assert error.value.reason == "wrong_preset"
    assert json.loads((path / "position.json").read_text())["preset"] == "tiny"
