"""A frozen trunk whose outputs are kept gives decoders and link heads what it gives them when it is run."""

from functools import partial

import pytest
import torch
from support.tiny_models import EXPERTS, SIDE, scene_batch, tiny_model

from lumen_ray.recipe import BranchSettings
from lumen_ray.trunk.kept import KeptOutputs

TASKS = {"lumen": ("detect", "pose", "refer"), "stable_diffusion": ("generate",)}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(lumen={"hidden_size": 16, "num_layers": 1, "num_heads": 2}, **_SECTION)
    model.trunk.requires_grad_(False)
    model.trunk.link_heads.requires_grad_(True)
    return model.train()


_SECTION = {"stable_diffusion": EXPERTS["stable_diffusion"]}


def batch_of(decoder, seed=0, count=4):
    batch = scene_batch(count, tasks=TASKS[decoder], seed=seed, branches=BranchSettings(max_poses=1))
    batch.decoders = [decoder]
    return batch


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    losses = model(batch)
    sum(term.total for term in losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("decoder", TASKS)
def test_gradients_are_those_of_a_trunk_that_runs(model, decoder, monkeypatch):
    """Also when some rows have been seen before and others have not."""
    batch, part = batch_of(decoder), batch_of(decoder, count=2)
    model.trunk.kept = None
    wanted = gradients(model, batch)
    model.trunk.kept = KeptOutputs(1 << 24)
    rows = []
    run = model.trunk._pass
    monkeypatch.setattr(model.trunk, "_pass", lambda batch: rows.append(len(batch.images)) or run(batch))
    gradients(model, part)
    for _ in range(2):
        found = gradients(model, batch)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name
    assert rows == [2, 2]  # the first two rows, then the others


def test_no_more_is_kept_than_there_is_room_for(model):
    batch = batch_of("lumen")
    dense = 16 * (SIDE // 4) ** 2 * 4
    model.trunk.kept = kept = KeptOutputs(2 * dense + 1)
    model.trunk.kept = None
    wanted = gradients(model, batch)
    model.trunk.kept = kept
    for _ in range(2):
        found = gradients(model, batch)
        assert all(torch.allclose(found[name], wanted[name], atol=1e-5, rtol=1e-4) for name in wanted)
    assert 0 <= kept.room < dense


def test_other_ranks_that_run_the_trunk_are_not_left_alone(model, monkeypatch):
    batch = batch_of("lumen")
    model.trunk.kept = KeptOutputs(1 << 24)
    gradients(model, batch)
    model.trunk.kept.any_rank = partial(max, True)
    rows = []
    run = model.trunk._pass
    monkeypatch.setattr(model.trunk, "_pass", lambda batch: rows.append(len(batch.images)) or run(batch))
    gradients(model, batch)
    assert rows == [1]


def test_what_is_kept_depends_on_the_pixels_and_on_every_token(model):
    batch, changed = batch_of("lumen"), batch_of("lumen")
    changed.images[0, 0, 0, 0] ^= 255
    with torch.no_grad():
        model.trunk.kept = None
        wanted = model.trunk(changed)
        model.trunk.kept = KeptOutputs(1 << 24)
        model.trunk(batch)
        found = model.trunk(changed)
    assert torch.allclose(found.dense, wanted.dense, atol=1e-5)
    assert torch.allclose(found.links["lumen"].embeddings, wanted.links["lumen"].embeddings, atol=1e-5)
