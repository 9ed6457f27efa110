"""Two FSDP ranks train a model with every decoder, on steps that each need another one."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from support.expert_fakes import TASKS, expert_batch, expert_model
from support.ranks import run_ranks
from support.tiny_models import EXPERTS, SIDE, tiny_settings
from support.train_fakes import cut_after, job_of, log_of, on_two_ranks
from torch.distributed.tensor import DTensor

from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.errors import UserError
from lumen_ray.model.build import build_model
from lumen_ray.precision import autocast_context
from lumen_ray.recipe import BLOCK_PARTS, Stage
from lumen_ray.train import parallel
from lumen_ray.train.blocks import checkpoint_blocks
from lumen_ray.train.launch import train_local
from lumen_ray.train.losses import StepLosses
from lumen_ray.train.optimizer import set_trainable

GROUPS = [
    {"tasks": ["detect", "segment"], "decoders": ["grounding_dino"]},
    {"tasks": ["pose"], "decoders": ["unipose"]},
    {"tasks": ["generate"]},
    {"tasks": ["edit"]},
    {"tasks": ["detect", "caption"], "decoders": ["lumen"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    prepare_source(folder / "shards", ScenesSource(16, side=SIDE, edits=True), rows_per_group=2, workers=0)
    learned = {"learned_class_scale": True, "denoising_queries": 4}
    sections = {name: EXPERTS[name] | (learned if "backbone" in EXPERTS[name] else {}) for name in EXPERTS}
    settings = tiny_settings(vocab_size=330, **sections)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return folder


STAGE = {"steps": 10, "warmup_steps": 0, "groups": GROUPS}


def test_every_decoder_learns_and_no_rank_waits(folder, tmp_path):
    job = job_of(folder, tmp_path / "run", STAGE, batch_size=4)
    assert run_ranks(job) == [0, 0]
    trained = load_file(f"{job.job.run}/model/model.safetensors")
    fresh = build_model(job.job.start.settings, len(job.job.start.tokenizer), job.job.recipe.seed)
    for name, decoder in fresh.decoders.items():
        ours = {key: trained[f"decoders.{name}.{key}"] for key, _ in decoder.named_parameters()}
        assert any((tensor - ours[key]).abs().max() > 1e-3 for key, tensor in decoder.named_parameters()), name
        assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    lines = log_of(Path(job.job.run))
    for loss in ("gdino_class", "unipose_keypoint", "generate", "edit", "heatmap"):
        logged = [line[f"loss/{loss}"] for line in lines if f"loss/{loss}" in line]
        assert 0 < len(logged) < len(lines) and min(logged) > 0, loss  # of the steps that train it, and of no other
    tasks = {name for line in lines for name in line if name.startswith("task/")}
    assert {"task/gdino_class/detect", "task/unipose_class/pose", "task/generate/generate", "task/edit/edit"} <= tasks


def test_a_run_resumed_before_every_decoder_has_learned_ends_with_the_same_bits(folder, tmp_path):
    """Decoders that no step has trained yet have no optimizer state in the checkpoint, and get theirs afterwards."""
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    train_local(job_of(folder, whole, STAGE, batch_size=4, checkpoint_every=3))
    shutil.copytree(whole, cut)
    cut_after(cut, 3)
    trained = {"loss/gdino_class", "loss/generate", "loss/edit"} & {name for line in log_of(cut)[:3] for name in line}
    assert len(trained) < 3  # else this run shows nothing
    train_local(job_of(folder, cut, STAGE, batch_size=4, checkpoint_every=3))
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_stage_that_its_group_cannot_train_is_refused(folder, tmp_path):
    stage = {"steps": 1, "trainable": ["unipose"], "groups": GROUPS[:2]}
    with pytest.raises(
        UserError, match="nothing under 'trainable' learns from the group detect, segment; leave it out"
    ):
        job_of(folder, tmp_path / "run", stage, batch_size=4)


CPU = torch.device("cpu")
#: (decoders that the step trains, task of each rank): some ranks ask nothing of a decoder that all of them train
STEPS = (
    (("grounding_dino",), ("segment", "caption")),
    (("unipose",), ("caption", "pose")),
    (("stable_diffusion",), ("generate", "caption")),
    (("instruct_pix2pix",), ("caption", "edit")),
    (("grounding_dino", "unipose"), ("pose", "segment")),
)


def batches_of(decoders, tasks):
    return [replace(expert_batch(task, 2, rank), decoders=decoders) for rank, task in enumerate(tasks)]


def backward(model, batch, seed, precision="fp32"):
    """A step on this rank; the mean losses of both."""
    torch.manual_seed(seed)
    losses = StepLosses(model.loss_names, {}, [batch], CPU)
    with autocast_context(precision == "bf16", CPU):
        found = model(batch)
    losses.add_batch(batch, found).backward()
    return losses.totals().means


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def alone(model, batches):
    """The gradients of a step over the batches of both ranks, in this process."""
    terms = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        terms += model(batch).items()
    counts = dict.fromkeys(model.loss_names, 0.0)
    for name, term in terms:
        counts[name] += float(term.count)
    sum(term.total / max(counts[name], 1.0) for name, term in terms).backward()
    return gradients(model)


def _in_parts(parts, look, link, levels, groups, *rest):
    parts.append(len(groups.image))
    return look(link, levels, groups, *rest)


def _uneven(in_parts=False):
    model, plain, parts = expert_model(), expert_model(), []
    for name in ("grounding_dino", "unipose") if in_parts else ():  # each group of prompts by itself, and again
        for decoder in (model.decoders[name], plain.decoders[name]):
            decoder.settings = decoder.settings.model_copy(update={"pixels_at_once": 1})
            decoder._decode = partial(_in_parts, parts, decoder._decode)
    checkpoint_blocks(model, BLOCK_PARTS)
    parallel.MIN_BLOCK_PARAMETERS = 0  # groups of the trunk beside those of the experts
    parallel.shard(model, CPU)
    # all of it; experts behind a trunk that does not learn; experts that only pass gradients on
    every = ((None, STEPS), (tuple(TASKS), STEPS[:3]), (("llm",), STEPS[::2]))
    for trainable, steps in ((None, STEPS[:2]),) if in_parts else every:
        for each in (plain, model):
            set_trainable(each, Stage.model_validate({"name": "s", "steps": 1, "trainable": trainable}))
        for decoders, tasks in steps:
            batches = batches_of(decoders, tasks)
            backward(model, batches[dist.get_rank()], dist.get_rank())
            ours, wanted = gradients(model), alone(plain, batches)
            assert set(parts) <= {1} and bool(parts) == in_parts
            assert ours.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=f"{name} {decoders} {tasks}")


def test_ranks_that_ask_nothing_of_an_expert_train_it_with_the_others():
    on_two_ranks(_uneven)


def test_ranks_that_look_at_their_prompts_part_by_part():
    on_two_ranks(_uneven, True)


def _gathered():
    """In every rank: which experts a step gathers and as what; that its losses are those of one process."""
    model, plain = expert_model(), expert_model()
    parallel.shard(model, CPU, "bf16")
    seen = {}
    for name, decoder in model.decoders.items():
        losses = type(decoder).losses

        def watched(*args, name=name, decoder=decoder, losses=losses):
            seen[name] = {n for n, d in model.decoders.items() if not isinstance(next(d.parameters()), DTensor)}
            seen[name, "kinds"] = {p.dtype for p in decoder.parameters()}
            return losses(decoder, *args)

        decoder.losses = watched
    for expert, task in TASKS.items():
        batches = batches_of([expert], (task, task))
        means = backward(model, batches[dist.get_rank()], dist.get_rank(), "bf16")
        assert seen[expert] == {expert}
        pictures = task in ("generate", "edit")
        assert seen[expert, "kinds"] == {torch.bfloat16 if pictures else torch.float32}
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        model.zero_grad()
        if not pictures:  # gathered as fp32: what bf16 does to their losses is the same in one process
            continue
        with torch.no_grad():
            terms = [plain(batch) for seed, batch in enumerate(batches) if torch.manual_seed(seed)]
        for name, mean in means.items():
            exact = sum(float(t[name].total) for t in terms) / max(sum(float(t[name].count) for t in terms), 1.0)
            assert mean == pytest.approx(exact, rel=0.03), name


def test_a_step_gathers_the_experts_it_trains_and_those_that_draw_as_bf16():
    on_two_ranks(_gathered)
