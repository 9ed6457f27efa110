"""Two FSDP ranks train a model with every decoder, on steps that each need another one."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import EXPERTS, SIDE, tiny_settings
from train_fakes import cut_after, job_of, log_of

from lumen_ray.data.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.errors import UserError
from lumen_ray.model.build import build_model
from lumen_ray.train.trainer import train_local

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
    fresh = build_model(job.job.settings, len(job.job.tokenizer), job.job.recipe.seed)
    for name, decoder in fresh.decoders.items():
        ours = {key: trained[f"decoders.{name}.{key}"] for key, _ in decoder.named_parameters()}
        assert any((tensor - ours[key]).abs().max() > 1e-3 for key, tensor in decoder.named_parameters()), name
        assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    lines = log_of(Path(job.job.run))
    for loss in ("gdino_class", "unipose_keypoint", "generate", "edit", "heatmap"):
        told = [line[f"loss/{loss}"] for line in lines if f"loss/{loss}" in line]
        assert 0 < len(told) < len(lines) and min(told) > 0, loss  # of the steps that train it, and of no other
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
