"""Checkpointed, compiled and sharded blocks compute what plain ones do, under the same names."""

import shutil
from dataclasses import replace

import pytest
import torch
from support.expert_fakes import TASKS, expert_batch, expert_model
from support.tiny_models import scene_batch, tiny_model
from support.train_fakes import on_two_ranks
from torch.distributed.fsdp import FSDPModule

from lumen_ray.errors import UserError
from lumen_ray.recipe import BLOCK_PARTS, Stage
from lumen_ray.train import parallel
from lumen_ray.train.blocks import blocks, check_compiler, checkpoint_blocks, compile_blocks, find_part
from lumen_ray.train.optimizer import set_trainable

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def gradients(model, batch):
    """(losses, gradient by name) of one pass, which draws the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(0)
    losses = model(batch)
    sum(term.total / term.count.clamp_min(1) for term in losses.values()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in found.items()}
    return {name: float(term.total.detach()) for name, term in losses.items()}, found


def same(ours, theirs, tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=max(tolerance, 1e-7))
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def test_blocks_are_the_layers_of_the_encoders_the_llm_and_the_aligner():
    model = tiny_model()
    assert [name for name, _ in blocks(find_part(model, "llm"))] == ["model.layers.0", "model.layers.1"]
    assert len(list(blocks(find_part(model, "vision")))) == 4
    assert [name for name, _ in blocks(find_part(model, "lumen"))] == ["aligner.layers.0"]


def test_blocks_of_the_experts_are_the_stages_layers_and_blocks_of_their_parts():
    model = expert_model()
    counts = {"backbone.swin.encoder": 4, "input_proj_vision": 4, "encoder": 1, "decoder": 2}
    for name in ("grounding_dino", "unipose"):
        names = [path.rpartition(".")[0] for path, _ in blocks(find_part(model, name))]
        lists = [path.removeprefix("trunk.").removesuffix(".layers") for path in names]
        assert {path: lists.count(path) for path in lists} == counts
    names = [path for path, _ in blocks(find_part(model, "stable_diffusion"))]
    assert {"unet.down_blocks.1", "unet.mid_block.resnets.0", "vae.encoder.down_blocks.0"} <= set(names)


@pytest.mark.parametrize("expert", TASKS)
def test_checkpointed_experts_draw_the_same_random_numbers(expert):
    """Denoising, diffusion's noise, dropout and dropped paths: what is computed again is what was computed."""
    batch, calls, found = replace(expert_batch(TASKS[expert]), decoders=[expert]), [], []
    for parts in ((), BLOCK_PARTS):
        model = expert_model(dropping=True)
        checkpoint_blocks(model, parts)
        *_, (_, block) = blocks(find_part(model, expert))
        next(block.children()).register_forward_pre_hook(lambda *_: calls.append(1))
        found.append((gradients(model, batch), len(calls)))
        calls.clear()
    (plain, once), (checkpointed, twice) = found
    same(checkpointed, plain, 0)
    assert twice == 2 * once > 0
    name = model.decoders[expert].loss_names[0]
    with torch.no_grad():
        assert float(model(batch)[name].total) != plain[0][name]  # it does draw


@pytest.mark.parametrize("trainable", [BLOCK_PARTS, ("llm",)])
def test_checkpointed_blocks_give_the_same_gradients(trainable):
    batch, plain, model = scene_batch(3), tiny_model().train(), tiny_model().train()
    checkpoint_blocks(model, BLOCK_PARTS)
    for each in (plain, model):
        set_trainable(each, Stage.model_validate({"name": "s", "steps": 1, "trainable": trainable}))
    same(gradients(model, batch), gradients(plain, batch), 0)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_checkpointed_block_is_computed_again():
    model, batch, calls = tiny_model().train(), scene_batch(1, ("caption",)), []
    find_part(model, "llm").model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, batch)
    assert len(calls) == 1
    checkpoint_blocks(model, ("llm",))
    gradients(model, batch)
    assert len(calls) == 3
    with torch.no_grad():
        model(batch)
    assert len(calls) == 4


def test_checkpoint_gets_a_positional_tensor(monkeypatch):
    """By a tensor on the device; it does not look at keywords, by which some blocks are called."""
    given, model = [], expert_model().train()

    def checkpoint(forward, *args, use_reentrant, **kwargs):
        given.append(any(isinstance(arg, torch.Tensor) for arg in args))
        return forward(*args, **kwargs)

    monkeypatch.setattr("lumen_ray.train.blocks.checkpoint", checkpoint)
    checkpoint_blocks(model, BLOCK_PARTS)
    for expert, task in TASKS.items():
        model(replace(expert_batch(task), decoders=[expert]))
    assert len(given) > 20 and all(given)


def _sharded_blocks():
    """In each rank: checkpointed, compiled, then sharded block by block, against a plain model; two lengths."""
    plain, model = tiny_model().train(), tiny_model().train()
    names = list(model.state_dict())
    checkpoint_blocks(model, BLOCK_PARTS)
    compile_blocks(model, BLOCK_PARTS, CPU, backend="aot_eager")  # all of the compiler but the kernels
    parallel.MIN_BLOCK_PARAMETERS = 0
    parallel.shard(model, CPU)
    assert isinstance(find_part(model, "llm").model.layers[0], FSDPModule)
    assert list(model.state_dict()) == names
    for seed, tasks in enumerate((("detect", "caption"), ("caption",))):
        batch = scene_batch(2, tasks, seed=seed)
        same(gradients(model, batch), gradients(plain, batch), 1e-4)


def test_checkpointed_compiled_and_sharded():
    on_two_ranks(_sharded_blocks)


def test_the_experts_are_compiled_but_for_their_backbones(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, backend: compiled.append(forward.__self__) or forward)
    model = expert_model()
    compile_blocks(model, tuple(TASKS), CPU, backend="aot_eager")
    for name in TASKS:
        found = [path for path, block in blocks(find_part(model, name)) if block in compiled]
        skipped = [path for path, block in blocks(find_part(model, name)) if block not in compiled]
        assert found and all(path.startswith(("trunk.backbone", "trunk.input_proj")) for path in skipped)
        assert len(skipped) == (8 if "trunk.encoder.layers.0" in found else 0)


@pytest.mark.slow
@pytest.mark.parametrize("expert", TASKS)
def test_compiled_experts_give_the_same_losses(expert):
    """All of the compiler but the kernels, which take many minutes to build on a CPU."""
    batch, plain, model = replace(expert_batch(TASKS[expert]), decoders=[expert]), expert_model(), expert_model()
    compile_blocks(model, (expert,), CPU, backend="aot_eager")
    ours, wanted = gradients(model, batch), gradients(plain, batch)
    assert ours[0] == pytest.approx(wanted[0], rel=1e-3)
    apart, whole = (
        sum(float((g - (ours[1][n] if other else 0)).square().sum()) for n, g in wanted[1].items()) for other in (1, 0)
    )
    assert apart < 1e-4 * whole


@needs_compiler
def test_compiled_blocks_give_the_same_losses():
    """Real kernels, of one kind of block and one shape: each takes many seconds to build."""
    batch, plain, model = scene_batch(2, ("caption",)), tiny_model().train(), tiny_model().train()
    checkpoint_blocks(model, ("llm",))
    compile_blocks(model, ("llm",), CPU)
    same(gradients(model, batch), gradients(plain, batch), 1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_missing_compiler_is_reported(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler.*compile: false"):
        check_compiler(CPU)
    compile_blocks(tiny_model(), (), CPU)
