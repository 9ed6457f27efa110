"""What a run starts from is what a plain model has, however its weights reach the ranks, and no rank holds them all."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.memory import peak_of
from support.tiny_models import EXPERTS, llm, scrambled, tiny_settings
from support.train_fakes import job_of, on_two_ranks, weights_of

from lumen_ray.checkpoints.safetensors_file import write_weights
from lumen_ray.footprint import meta_model
from lumen_ray.model.build import build_model, count_parameters, save_model
from lumen_ray.model.warm_start import taught_heads
from lumen_ray.train import parallel
from lumen_ray.train.lora import inject, plain_name
from lumen_ray.train.trainer import sharded_model

CPU = torch.device("cpu")
STAGE = {"steps": 1}
LORA = {"rank": 2, "alpha": 4}
DINO = {"grounding_dino": EXPERTS["grounding_dino"]}


def preset(data: Path, folder: Path, **changes) -> Path:
    """A folder with the shards of `data` and another preset beside them."""
    folder.mkdir()
    (folder / "shards").symlink_to(data / "shards")
    settings = tiny_settings(vocab_size=320, **changes)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return folder


def drawn(job):
    """The fresh weights of a run's model."""
    model = build_model(job.start.settings, len(job.start.tokenizer), job.recipe.seed)
    if job.recipe.lora:
        inject(model, job.recipe.lora, job.recipe.seed)
    return model


def saved(job, folder: Path) -> str:
    """The folder of a model to start from."""
    model = scrambled(drawn(job))
    return str(save_model(folder, model.state_dict(), job.start.settings, job.start.tokenizer, job.meta))


def same(state, expected) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def check_rank(job, wanted: Path) -> None:
    model = sharded_model(job, None, CPU)
    assert model.trunk.llm.lm_head.weight is model.trunk.llm.model.embed_tokens.weight
    state = parallel.full_state(model)
    assert parallel.rank() == 1 or same(state, load_file(wanted))


def check_two_ranks(job, wanted: dict[str, torch.Tensor], folder: Path) -> None:
    write_weights(folder / "wanted", wanted)
    on_two_ranks(check_rank, job, folder / "wanted")


@pytest.mark.parametrize("options", [{}, {"lora": LORA}])
def test_fresh_weights_are_those_of_a_plain_model(data, tmp_path, options):
    if options:
        pytest.importorskip("peft", reason="LoRA needs peft")
    job = job_of(data, tmp_path / "run", STAGE, seed=5, **options).job
    before = torch.random.get_rng_state()
    model = sharded_model(job, None, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    wanted = drawn(job)
    assert same(model.state_dict(), wanted.state_dict())
    assert model.trunk.llm.lm_head.weight is model.trunk.llm.model.embed_tokens.weight
    for (name, p), (other, q) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert (name, p.requires_grad) == (other, q.requires_grad)
    check_two_ranks(job, wanted.state_dict(), tmp_path)


@pytest.mark.parametrize("options", [{}, {"lora": LORA}])
def test_a_folder_and_fresh_weights_for_what_it_lacks(data, tmp_path, options):
    if options:
        pytest.importorskip("peft", reason="LoRA needs peft")
    old = saved(job_of(data, tmp_path / "old", STAGE).job, tmp_path / "before" / "model")
    job = job_of(preset(data, tmp_path / "more", **DINO), tmp_path / "run", STAGE, init_from=old, **options).job
    stored, fresh = weights_of(Path(old).parent), drawn(job).state_dict()
    wanted = {name: stored.get(plain_name(name), tensor) for name, tensor in fresh.items()}
    missing = {name: tensor for name, tensor in fresh.items() if wanted[name] is tensor}
    wanted |= {name: stored[other] for name, other in taught_heads(missing, stored).items()}
    assert 0 < sum(wanted[name] is tensor for name, tensor in fresh.items()) < len(fresh)
    assert same(sharded_model(job, None, CPU).state_dict(), wanted)
    check_two_ranks(job, wanted, tmp_path)


def check_memory(job, most: dict[int, float]) -> None:
    size = 4 * count_parameters(meta_model(job.start.settings)) / (1 << 20)
    assert size > 100
    parallel.from_all_ranks(torch.zeros(1 << 20))  # what the group needs for itself
    with peak_of() as mebibytes:
        model = sharded_model(job, None, CPU)
    assert mebibytes() < most[parallel.rank()] * size
    assert sum(p.to_local().numel() for p in model.parameters()) * 4 > 0.45 * size * (1 << 20)


def test_a_rank_holds_its_part_of_the_weights(data, tmp_path):
    large = llm() | {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8, "head_dim": 64,
    }  # fmt: skip
    folder = preset(data, tmp_path / "large", llm=large)
    job = job_of(folder, tmp_path / "fresh", STAGE).job
    on_two_ranks(check_memory, job, {0: 1.8, 1: 0.8})  # the first draws them all
    start = saved(job, tmp_path / "start")
    job = job_of(folder, tmp_path / "run", STAGE, init_from=start).job
    on_two_ranks(check_memory, job, {0: 0.8, 1: 0.8})
