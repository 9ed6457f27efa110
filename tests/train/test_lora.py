"""Adapters learn, what they adapt stays, and the model folder is plain."""

import pytest
import torch
from support.tiny_models import scene_batch, scrambled, tiny_model
from support.train_fakes import cut_after, job_of, log_of, on_two_ranks, weights_of

from lumen_ray.errors import UserError
from lumen_ray.model.build import build_model, load_model
from lumen_ray.recipe import LoraSettings, Stage
from lumen_ray.train.launch import train_local
from lumen_ray.train.lora import changing_state, frozen_names, inject, plain_state
from lumen_ray.train.optimizer import build_optimizer, set_trainable
from lumen_ray.train.run import checkpoint

pytest.importorskip("peft", reason="LoRA needs peft (pip install 'lumen-ray[lora]')")

SETTINGS = LoraSettings(rank=4, alpha=8)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "save_adapters": True}
STAGES = ({"steps": 4}, {"steps": 4, "groups": [{"tasks": ["caption", "vqa"]}]})


def adapted(**changes):
    model = scrambled(tiny_model())
    inject(model, SETTINGS.model_copy(update=changes), 0)
    return model


def losses(model, batch):
    return {name: float(term.total.detach()) for name, term in model(batch).items()}


def test_a_fresh_adapter_changes_nothing_and_a_learned_one_survives_the_merge():
    plain, model, batch = scrambled(tiny_model()), adapted(), scene_batch(3)
    assert losses(model, batch) == losses(plain, batch)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(0, 0.5)
    learned = losses(model, batch)
    assert learned["lm"] != pytest.approx(losses(plain, batch)["lm"], rel=1e-3)
    merged = tiny_model().eval()
    merged.load_state_dict(plain_state(model.state_dict(), SETTINGS))
    assert losses(merged, batch) == pytest.approx(learned, rel=1e-4)


def test_the_llm_but_for_adapters_and_embeddings_is_frozen():
    model = adapted()
    stage = Stage.model_validate({"name": "s", "steps": 1})
    set_trainable(model, stage)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    of_llm = {name for name in learns if name.startswith("trunk.llm.")}
    assert of_llm and all(".lora_" in name or "embed_tokens" in name for name in of_llm)
    assert {name for name, _ in model.named_parameters()} - learns == frozen_names(model)
    held = {id(p) for group in build_optimizer(model, stage).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(name in frozen_names(model) for name in changing_state(model))
    without = Stage.model_validate({"name": "s", "steps": 1, "trainable": ["lumen"]})
    set_trainable(model, without)
    assert not any(p.requires_grad for p in model.trunk.llm.parameters())


def test_targets_are_chosen_by_name():
    model = adapted(targets=("trunk.llm.*.q_proj", "trunk.vision.clip.*.k_proj"), also_train=())
    names = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    assert len(names) == 4 and all("q_proj" in n or "clip" in n for n in names)
    for changes, word in (({"targets": ("*.q_prj",)}, "targets"), ({"also_train": ("trunk.llm.head",)}, "also_train")):
        with pytest.raises(UserError, match=f"lora.{word}: '.*' matches nothing") as error:
            adapted(**changes)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    train_local(job_of(data, run, *STAGES, lora=LORA, checkpoint_every=2))
    return run


def test_a_run_exports_a_plain_model(data, whole):
    prepared = job_of(data, whole, *STAGES, lora=LORA, checkpoint_every=2)
    start = build_model(prepared.job.start.settings, len(prepared.job.start.tokenizer), 0).state_dict()
    model = load_model(whole / "model").model.state_dict()
    moved = {name for name in start if not torch.equal(model[name], start[name])}
    assert any("q_proj" in name for name in moved) and any("embed_tokens" in name for name in moved)
    assert not any("llm" in name and "norm" in name for name in moved if name.startswith("trunk.llm"))
    change = model["trunk.llm.model.layers.0.mlp.up_proj.weight"] - start["trunk.llm.model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= SETTINGS.rank
    assert (whole / "adapters.safetensors").is_file()


def test_checkpoints_leave_out_what_stays(whole):
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(checkpoint.shards_of(checkpoint.latest(whole))).read_metadata().state_dict_metadata
    assert any(".lora_A" in name for name in names)
    assert not any("base_layer" in name for name in names)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_ends_with_the_same_bits(data, whole, tmp_path, step):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    cut_after(run, step)
    train_local(job_of(data, run, *STAGES, lora=LORA, checkpoint_every=2))
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["loss"] for line in log_of(run)] == [line["loss"] for line in log_of(whole)]


def test_on_two_ranks(data, tmp_path):
    """Without dropout, which every rank draws for itself."""
    options = {"lora": LORA | {"dropout": 0.0}}
    train_local(job_of(data, tmp_path / "one", *STAGES, **options))
    on_two_ranks(train_local, job_of(data, tmp_path / "two", *STAGES, **options, workers=2))
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert weights_of(tmp_path / "one").keys() == weights_of(tmp_path / "two").keys()
