"""Two FSDP ranks train a model with every decoder, on steps that each need another one."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file
from test_parallel import _rank
from tiny_models import EXPERTS, SIDE, tiny_settings
from train_fakes import log_of

from lumen_ray.data.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.model.build import build_model
from lumen_ray.train.recipe import Recipe
from lumen_ray.train.trainer import prepare_job

GROUPS = [
    {"tasks": ["detect", "segment"], "decoders": ["grounding_dino"]},
    {"tasks": ["pose"], "decoders": ["unipose"]},
    {"tasks": ["generate"]},
    {"tasks": ["edit"]},
    {"tasks": ["detect", "caption"], "decoders": ["lumen"]},
]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    prepare_source(folder / "shards", ScenesSource(16, side=SIDE, edits=True), rows_per_group=2, workers=0)
    learned = {"learned_class_scale": True, "denoising_queries": 4}
    sections = {name: EXPERTS[name] | (learned if "backbone" in EXPERTS[name] else {}) for name in EXPERTS}
    settings = tiny_settings(vocab_size=330, **sections)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    stages = [{"name": "joint", "steps": 10, "warmup_steps": 0, "groups": GROUPS}]
    recipe = {"name": "tiny", "model": str(folder / "tiny.yaml"), "batch_size": 4, "stages": stages}
    return prepare_job(folder / "shards", Recipe.model_validate(recipe), folder / "run")


def test_every_decoder_learns_and_no_rank_waits(job, tmp_path):
    mp.spawn(_rank, (job, tmp_path / "store"), nprocs=2)
    trained = load_file(f"{job.job.run}/model/model.safetensors")
    fresh = build_model(job.job.settings, len(job.job.tokenizer), job.job.recipe.seed)
    for name, decoder in fresh.decoders.items():
        ours = {key: trained[f"decoders.{name}.{key}"] for key, _ in decoder.named_parameters()}
        assert any((tensor - ours[key]).abs().max() > 1e-3 for key, tensor in decoder.named_parameters()), name
        assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    lines = log_of(Path(job.job.run))
    for loss in ("gdino_class", "unipose_keypoint", "generate", "edit", "heatmap"):
        assert any(line[f"loss/{loss}"] > 0 for line in lines), loss
