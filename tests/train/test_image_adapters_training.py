"""Image adapters are trained in place of the LLM, whose weights keep their bits."""

import shutil

import pytest
import torch
import yaml
from support.tiny_models import tiny_folder, tiny_settings
from support.train_fakes import cut_after, job_of, log_of, make_shards, on_two_ranks, weights_of

from lumen_ray.checkpoints.safetensors_file import WeightsFile
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.train.launch import train_local
from lumen_ray.train.run import checkpoint

PUBLISHED = 90
ADAPTERS = {"rank": 2, "alpha": 4}
STAGES = ({"steps": 2, "trainable": ["queries"]}, {"steps": 4, "lr": 0.01})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_shards(tmp_path_factory.mktemp("adapters"))
    settings = tiny_settings(vocab_size=330, image_adapters=ADAPTERS)
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    tiny_folder(root / "start", published_tokens=PUBLISHED, image_adapters=ADAPTERS)
    return root


def job(data, run, **changes):
    return job_of(data, run, *STAGES, init_from=str(data / "start"), checkpoint_every=2, **changes)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    train_local(job(data, run))
    return run


def test_the_llm_stays_and_its_adapters_learn(data, whole):
    start, end = WeightsFile(data / "start" / "model.safetensors"), weights_of(whole)
    moved = {name for name in start.shapes() if not torch.equal(start[name], end[name])}
    of_llm = {name for name in moved if name.startswith("trunk.llm.")}
    assert any(name.endswith("lora_A") for name in of_llm) and any(name.endswith("lora_B") for name in of_llm)
    assert all(".lora_" in name or "embed_tokens" in name for name in of_llm)
    words = "trunk.llm.model.embed_tokens.weight"
    assert torch.equal(start[words][:PUBLISHED], end[words][:PUBLISHED])
    assert "trunk.vision.projector.weight" in moved
    assert Engine.load(whole / "model").loaded.settings.image_adapters.rank == 2


def test_checkpoints_leave_out_the_llm(whole):
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(checkpoint.shards_of(checkpoint.latest(whole))).read_metadata().state_dict_metadata
    of_llm = [name for name in names if name.startswith("model.trunk.llm.")]
    assert of_llm and all(".lora_" in name or "embed_tokens" in name or "lm_head" in name for name in of_llm)


def test_a_resumed_run_ends_with_the_same_bits(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    cut_after(tmp_path / "run", 4)
    train_local(job(data, tmp_path / "run"))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_on_two_ranks(data, whole, tmp_path):
    on_two_ranks(train_local, job(data, tmp_path / "two", workers=2))
    for a, b in zip(log_of(whole), log_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_lora_beside_them_is_refused(data, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="has image_adapters, which learn in place of its LLM; leave lora out"):
        job(data, tmp_path / "run", lora={"rank": 2})
