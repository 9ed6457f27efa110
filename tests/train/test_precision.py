"""bf16 arithmetic keeps weights, gradients and losses in fp32, and learns alike."""

import pytest
import torch
from support.tiny_models import scene_batch, tiny_model
from support.train_fakes import job_of, log_of, on_two_ranks, weights_of

from lumen_ray.precision import autocast_context
from lumen_ray.recipe import BLOCK_PARTS
from lumen_ray.train import parallel
from lumen_ray.train.blocks import checkpoint_blocks, find_part
from lumen_ray.train.launch import train_local
from lumen_ray.train.precision import advice, block_policy

CPU = torch.device("cpu")


def test_losses_and_gradients_stay_fp32_and_near():
    model, batch = tiny_model().train(), scene_batch(3)
    exact = model(batch)
    seen = []
    layer = find_part(model, "llm").model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with autocast_context(True, CPU):
        losses = model(batch)
    sum(term.total for term in losses.values()).backward()
    assert seen == [torch.bfloat16]
    for name, term in losses.items():
        assert term.total.dtype == torch.float32
        assert float(term.total.detach()) == pytest.approx(float(exact[name].total.detach()), rel=0.05)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    with autocast_context(False, CPU):
        assert torch.equal(model(batch)["lm"].total, exact["lm"].total)


def _sharded():
    """Blocks gathered as bf16, computed again in the backward pass, their gradients added up in fp32."""
    batch, plain, model = scene_batch(2, seed=1), tiny_model().train(), tiny_model().train()
    checkpoint_blocks(model, BLOCK_PARTS)
    parallel.MIN_BLOCK_PARAMETERS = 0
    parallel.shard(model, CPU, "bf16")
    kinds = set()
    block = find_part(model, "llm").model.layers[0]
    forward = block.mlp.forward
    block.mlp.forward = lambda x: (kinds.add((x.dtype, block.mlp.up_proj.weight.dtype)), forward(x))[1]
    with autocast_context(True, CPU):
        losses = model(batch)
    sum(term.total for term in losses.values()).backward()
    assert kinds == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    for name, term in plain(batch).items():
        assert float(losses[name].total.detach()) == pytest.approx(float(term.total.detach()), rel=0.05)


def test_sharded_blocks_are_gathered_as_bf16():
    on_two_ranks(_sharded)


def test_a_run_in_bf16_learns_as_one_in_fp32(data, tmp_path):
    stage = {"steps": 8, "groups": [{"tasks": ["caption", "vqa"]}]}
    for precision in ("fp32", "bf16"):
        train_local(job_of(data, tmp_path / precision, stage, precision=precision))
    exact, rounded = ([line["loss"] for line in log_of(tmp_path / p)] for p in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != exact
    assert {w.dtype for w in weights_of(tmp_path / "bf16").values()} == {torch.float32}


def test_a_slow_choice_is_reported(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert "3 to 4 times slower" in advice("bf16", CPU)
    assert advice("fp32", CPU) is None
    assert advice("bf16", torch.device("cuda")) is None
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert advice("bf16", CPU) is None
    assert block_policy("fp32").param_dtype is None and block_policy("bf16").reduce_dtype == torch.float32
