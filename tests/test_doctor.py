"""What `doctor` says is counted on the model, and its exit status says whether the preset can run."""

import re
import socket

import pytest
import torch
from support.tiny_models import EXPERTS, tiny_model, tiny_settings, tiny_tokenizer

from lumen_ray import cli, doctor, installation
from lumen_ray.doctor import Finding, Role, examine, meta_model, roles_of
from lumen_ray.errors import UserError
from lumen_ray.footprint import combined, count_recipe
from lumen_ray.model.build import ModelMeta, count_parameters, save_model
from lumen_ray.recipe import Recipe


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def states(sections, title):
    return [finding.state for name, findings in sections.items() if name.startswith(title) for finding in findings]


def text(sections):
    return "\n".join(finding.text for findings in sections.values() for finding in findings)


def test_nano_can_run_with_what_is_bundled(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "preset 'nano' can run here" in out and "weights/nano/model.safetensors" in out
    assert "lumen-ray[lora]" in out.replace("\n", "")  # brackets are not markup


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("nano-experts", "train it, its recipe starts from 'nano'"),
        ("small", "train it, its recipe starts from fresh weights"),
        ("nano-256", "train it"),  # no recipe goes by that name
    ],
)
def test_where_a_training_starts_is_reported(preset, said):
    assert text(examine(preset)[0]).endswith(said)


def test_7b_says_which_weights_are_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_memory", lambda: [80 * installation.GIB])
    monkeypatch.setattr(doctor, "machine", lambda: iter(()))
    assert cli.main(["doctor", "--preset", "7b"]) == 1
    out = capsys.readouterr().out
    assert "lumen-ray convert pretrained ... --preset 7b DIR" in out
    assert "'train' starts from it with --init-from DIR" in out
    assert "9,542,065,496 parameters" in out  # CLIP, DINOv2, the LLM with the preset's vocabulary, three decoders
    assert "published grounding_dino: 63,160,578" in out  # without masks and what projects links
    assert "not published, start from fresh weights: lumen, unipose" in out
    for role in ("trunk", "lumen", "grounding_dino", "unipose", "stable_diffusion", "instruct_pix2pix", "in all"):
        assert re.search(rf"{role} +[\d,]+ parameters; inference", out)
    assert "on each of 32 ranks" in out  # of its recipe
    assert "and at most 0.5 GiB for the one on its way" in " ".join(out.split())  # the LLM's embedding
    assert "the host of the first rank also holds the whole model, 36.9 GiB" in " ".join(out.split())
    assert "inference fits in the largest GPU" in out
    out = " ".join(out.split())
    assert "none found" not in out and "found on this machine: 80.0 GiB" in out
    assert "training by recipe '7b', in bf16, needs 32 with more than 7.4 GiB each; this machine has 1" in out
    assert "trains 2,148,336,440 parameters at most, in stage 'joint'" in out  # LoRA's adapters, not the LLM


@pytest.mark.parametrize(
    ("free", "gpus", "able"),
    [(1 << 40, [], True), (1 << 20, [], False), (1 << 20, [1 << 40], True), (1 << 40, [1 << 20], False)],
)
def test_memory_decides(monkeypatch, free, gpus, able):
    monkeypatch.setattr(doctor, "machine", lambda: iter(()))  # it asks real GPUs for their names
    monkeypatch.setattr(doctor, "host_memory", lambda: free)
    monkeypatch.setattr(doctor, "gpu_memory", lambda: gpus)
    assert examine("nano")[1] is able


def tiny_recipe(**changes):
    stages = ({"name": "all", "steps": 1}, {"name": "some", "steps": 1, "trainable": ["lumen"]})
    return Recipe.model_validate({"name": "tiny", "model": "tiny", "stages": stages, **changes})


@pytest.mark.parametrize(
    ("gpus", "precision", "state", "words"),
    [
        ([], "bf16", "short", "none found on this machine"),
        ([1 << 20], "bf16", "short", "needs 2 with more than .* this machine has 0, the others"),  # too small
        ([1 << 40], "bf16", "short", "this machine has 1, the others must be in the Ray cluster"),
        ([1 << 40] * 2, "bf16", "ok", "this machine has 2$"),
        ([], "fp32", "note", "training by recipe 'tiny' runs without a GPU, in fp32"),
    ],
)
def test_what_is_needed_of_gpus_and_what_is_missing(monkeypatch, gpus, precision, state, words):
    monkeypatch.setattr(doctor, "gpu_memory", lambda: gpus)
    settings = tiny_settings()
    counted = count_recipe(settings, tiny_recipe(precision=precision))
    findings = list(doctor._gpus(roles_of(meta_model(settings)), counted, 2))
    assert findings[-1].state == state
    assert re.search(words, "\n".join(finding.text for finding in findings), re.MULTILINE)


def test_a_preset_without_the_gpus_to_train_it_says_so_and_can_run(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "machine", lambda: iter(()))
    monkeypatch.setattr(doctor, "gpu_memory", list)
    monkeypatch.setattr(doctor, "host_memory", lambda: 1 << 40)
    assert cli.main(["doctor", "--preset", "small"]) == 0  # its recipe computes in bf16
    out = " ".join(capsys.readouterr().out.split())
    assert "preset 'small' can run here, but not be trained by its recipe: training by recipe 'small', in bf16" in out


def test_what_a_recipe_trains_is_counted():
    settings, model = tiny_settings(vocab_size=len(tiny_tokenizer())), tiny_model()
    whole, part = count_parameters(model), count_parameters(model.decoders["lumen"])
    counted = count_recipe(settings, tiny_recipe())
    assert (counted.stage, counted.model.num_trainable, counted.averaged) == ("all", whole, 0)
    averaging = count_recipe(settings, tiny_recipe(ema={}))
    assert averaging.memory(1) - counted.memory(1) == 4 * averaging.averaged >= 4 * whole
    one = count_recipe(settings, tiny_recipe(stages=[{"name": "some", "steps": 1, "trainable": ["lumen"]}]))
    assert one.model.num_trainable == part and one.model.parameters == whole
    lora = count_recipe(settings, tiny_recipe(lora={"rank": 2}))
    assert lora.model.parameters > whole and lora.model.num_trainable < whole
    assert "first rank" not in str(
        list(doctor._needs(roles_of(meta_model(settings)), 1, counted))
    )  # it keeps all anyway


def test_without_peft_it_says_what_it_cannot_count(monkeypatch):
    def missing():
        raise UserError("pip install 'lumen-ray[lora]'")

    monkeypatch.setattr("lumen_ray.train.lora._peft", missing)
    counted = count_recipe(tiny_settings(), tiny_recipe(lora={}))
    out = [finding.text for finding in doctor._needs(roles_of(meta_model(tiny_settings())), 1, counted)]
    assert out[-1] == "recipe 'tiny': its trainable parameters cannot be counted: pip install 'lumen-ray[lora]'"


def test_roles_may_have_a_gpu_each(monkeypatch):
    roles = [Role("trunk", 10**6, 0), Role("decoder", 10**6, 0)]
    cases = (
        ([5 * 10**6], "ok", "with --dtype bfloat16: about 3.8 MiB of 4.8 MiB"),
        ([5 * 10**6] * 2, "ok", "with a GPU for each role"),
        ([3 * 10**6] * 2, "missing", "needs 7.6 MiB but"),
    )
    for gpus, state, out in cases:
        monkeypatch.setattr(doctor, "gpu_memory", lambda gpus=gpus: gpus)
        ((found, text),) = [(f.state, f.text) for f in doctor._room(roles)]
        assert found == state and out in text


def test_roles_are_counted_on_the_model():
    model, roles = tiny_model(), roles_of(meta_model(tiny_settings(vocab_size=len(tiny_tokenizer()))))
    assert [role.name for role in roles] == ["trunk", *model.decoders]
    assert roles[0].parameters == count_parameters(model.trunk)
    assert roles[0].unsharded == roles[0].parameters and roles[0].gathered == 0  # all blocks are small
    assert roles[0].largest == max(p.numel() for p in model.trunk.parameters()) == combined(roles).largest


def test_training_memory_is_shared_by_the_ranks():
    role = Role("trunk", 1000, 1000, gathered=20, unsharded=100)
    assert role.training(1) == 1000 * 16
    assert role.training(4) == 4000 + (20 + 100) * 4
    assert Role("frozen", 1000, 0).training(1) == 1000 * 4


def test_the_per_rank_count_is_what_sharding_leaves(monkeypatch):
    """The same split as `train.parallel.shard`: large blocks by themselves, the rest in the root's group."""
    from lumen_ray.train import parallel

    monkeypatch.setattr(parallel, "MIN_BLOCK_PARAMETERS", 1)
    role, model = roles_of(meta_model(tiny_settings(vocab_size=len(tiny_tokenizer()))))[0], tiny_model()
    inside = [
        count_parameters(block)
        for name in ("vision", "llm") for _, block in parallel.blocks(getattr(model.trunk, name))
    ]  # fmt: skip
    assert role.gathered == 2 * max(inside) and role.unsharded == role.parameters - sum(inside)


def test_an_expert_is_gathered_while_it_computes():
    counted = roles_of(meta_model(tiny_settings(vocab_size=330, **EXPERTS)))
    experts = {role.name: role for role in counted if role.name in EXPERTS}
    assert set(experts) == set(EXPERTS)
    assert all(role.gathered == role.parameters and role.unsharded == 0 for role in experts.values())
    whole = combined(counted)
    assert whole.gathered == max(role.parameters for role in experts.values())
    pair = combined(counted, [["lumen", "grounding_dino", "unipose"], ["stable_diffusion"]])
    assert pair.gathered == experts["grounding_dino"].parameters + experts["unipose"].parameters
    group = {"tasks": ["detect", "pose"]}  # that all decoders learn from which can
    stages = ({"name": "all", "steps": 1, "groups": [group]},)
    assert (
        count_recipe(tiny_settings(vocab_size=330, **EXPERTS), tiny_recipe(stages=stages)).model.gathered
        == pair.gathered
    )
    assert whole.unsharded == sum(role.parameters for role in counted if role.name not in EXPERTS)


def test_a_model_folder_must_be_of_the_preset(tmp_path):
    folder = save_model(tmp_path / "m", tiny_model().state_dict(), tiny_settings(), tiny_tokenizer(), ModelMeta("tiny"))
    sections, able = examine("nano", str(folder))
    assert not able and "of preset 'tiny'" in text(sections)
    assert cli.main(["doctor", "--model", str(tmp_path / "nowhere")]) == 2


def test_packages_are_held_against_the_tested_versions(monkeypatch):
    wanted = ["torch>=99", "no-such-package>=1", 'peft>=0.1; extra == "lora"', 'ruff; extra == "test"',
              'winthing; sys_platform == "win32"']  # fmt: skip
    monkeypatch.setattr(installation, "requirements", lambda: wanted)
    sections, able = examine("nano")
    assert not able and list(sections) == ["packages"]  # nothing that needs them is tried
    out = text(sections)
    assert f"torch {torch.__version__}, tested with >=99" in out and "no-such-package is not installed" in out
    assert "ruff" not in out and "winthing" not in out and "lumen-ray[lora]" in out
    assert states(sections, "packages").count("missing") == 2


def test_a_decoder_without_its_package(monkeypatch):
    def build(settings):
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setattr(doctor, "meta_model", build)
    sections, able = examine("nano")
    assert not able and "needs a package that is not installed: No module named 'diffusers'" in text(sections)


def test_the_ray_cluster_is_checked(monkeypatch):
    assert installation.ray_cluster().state == "ok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert installation.ray_cluster() == Finding("ok", f"Ray: the cluster at {address} answers")
    assert installation.ray_cluster().state == "missing"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert installation.ray_cluster().state == "note"
