"""A trained model as the start of one with other decoders."""

from dataclasses import replace

import pytest
import torch
from support.tiny_models import EXPERTS, llm, scene_batch, scrambled, tiny_model, tiny_settings

from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, build_model, load_model, save_model
from lumen_ray.model.warm_start import StartWeights, start_settings, start_tokenizer, taught_heads
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.tokenizer import LumenTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One with the routing tokens of perception only."""
    return LumenTokenizer.train(["red circle blue square"] * 3 + [t.prompt("x") for t in TASKS.values()], 320)


@pytest.fixture
def folder(tmp_path, tokenizer):
    model = scrambled(build_model(tiny_settings(), len(tokenizer)))
    return save_model(tmp_path / "model", model.state_dict(), tiny_settings(), tokenizer, ModelMeta("tiny"))


def started(folder, **changes):
    settings = start_settings(tiny_settings(**changes), folder)
    tokenizer = start_tokenizer(settings, folder)
    model = build_model(settings, len(tokenizer), seed=7)
    model.load_state_dict(model.state_dict() | dict(StartWeights(model, folder)))
    return model, tokenizer


def test_the_same_model_goes_on_as_it_was(folder, tokenizer):
    model, ours = started(folder)
    before = load_model(folder).model.state_dict()
    assert ours.to_json() == tokenizer.to_json()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_new_decoders_have_fresh_weights_and_all_else_is_kept(folder, tokenizer):
    model, ours = started(folder, name="more", **EXPERTS)
    old, new = load_model(folder).model.state_dict(), model.state_dict()
    fresh = build_model(model.settings, len(ours), seed=7).state_dict()
    known = len(tokenizer)
    assert len(ours) == known + 2 and ours.ids["[GEN]"] == known and ours.ids["[EDIT]"] == known + 1
    for name, tensor in new.items():
        if name in old and tensor.shape == old[name].shape:
            assert torch.equal(tensor, old[name]), name
        elif name in old:
            assert torch.equal(tensor[:known], old[name]), name
            assert torch.allclose(tensor[known:], old[name].mean(0), atol=1e-6), name
        else:
            assert torch.equal(tensor, fresh[name]), name
    added = {".".join(name.split(".")[:2]) for name in new.keys() - old.keys()}
    assert added == {f"decoders.{name}" for name in EXPERTS} | {"trunk.link_heads", "trunk.queries"}


def test_word_embeddings_of_a_picture_head_grow_with_the_vocabulary(tmp_path, tokenizer):
    draws = {"stable_diffusion": EXPERTS["stable_diffusion"]}
    settings = tiny_settings(**draws)
    drawing = LumenTokenizer.extend(tokenizer.backend, tokenizer.names, settings.families)[0]
    before = scrambled(build_model(settings, len(drawing))).state_dict()
    folder = save_model(tmp_path / "draws", before, settings, drawing, ModelMeta("tiny"))
    model, ours = started(folder, **draws, instruct_pix2pix=EXPERTS["instruct_pix2pix"])
    head = "trunk.link_heads.stable_diffusion.vocabulary.weight"
    old, new = before[head], model.state_dict()[head]
    assert len(new) == len(ours) == len(old) + 1
    assert torch.equal(new[: len(old)], old)
    assert torch.allclose(new[len(old) :], old.mean(0), atol=1e-6)


def test_the_decoder_that_is_kept_gives_the_same_losses(folder):
    batch = scene_batch(2, tasks=("detect", "segment"))
    before = load_model(folder).model
    after, _ = started(folder, grounding_dino=EXPERTS["grounding_dino"])
    with torch.no_grad():
        one, two = before(batch), after.eval()(replace(batch, decoders=["lumen"]))
    assert one.keys() == two.keys()
    assert all(float(one[name].total) == float(two[name].total) for name in one)


def test_decoders_that_the_new_model_lacks_are_left_out(tmp_path, tokenizer):
    both = tiny_settings(**{k: v for k, v in EXPERTS.items() if k == "grounding_dino"})
    model = scrambled(build_model(both, len(tokenizer)))
    folder = save_model(tmp_path / "both", model.state_dict(), both, tokenizer, ModelMeta("tiny"))
    less, _ = started(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in less.state_dict().items())


DINO = {"grounding_dino": EXPERTS["grounding_dino"]}


@pytest.mark.parametrize("tokens_read_stem", [True, False])
def test_the_light_decoder_may_be_dropped_and_added(tmp_path, tokenizer, tokens_read_stem):
    """It alone reads the dense features, and, where image tokens do not, the stem."""
    light = {"tokens_read_stem": tokens_read_stem}
    expert = light | {"lumen": None} | DINO

    def saved(name, **changes):
        settings = tiny_settings(**changes)
        state = scrambled(build_model(settings, len(tokenizer))).state_dict()
        return save_model(tmp_path / name, state, settings, tokenizer, ModelMeta("tiny")), state

    (lumen, ours), (dino, theirs) = saved("lumen", **light), saved("dino", **expert)
    less = started(lumen, **expert)[0].state_dict()
    assert not any(name.startswith("trunk.dense.") for name in less)
    assert any(name.startswith("trunk.stem.") for name in less) == tokens_read_stem
    more = started(dino, **light, **DINO)[0].state_dict()
    fresh = build_model(tiny_settings(**light, **DINO), len(tokenizer), seed=7).state_dict()
    for result, before in ((less, ours), (more, theirs)):
        assert all(torch.equal(result[name], before[name]) for name in result.keys() & before.keys())
    added = more.keys() - theirs.keys()
    assert all(torch.equal(more[name], fresh[name]) for name in added)
    places = {".".join(name.split(".")[:2]) for name in added}
    stem = set() if tokens_read_stem else {"trunk.stem"}
    assert places == {"decoders.lumen", "trunk.link_heads", "trunk.dense"} | stem


def test_another_trunk_is_refused(folder):
    with pytest.raises(UserError) as error:
        start_settings(tiny_settings(name="wide", dense_channels=24, prefix_attention="causal"), folder)
    assert error.value.reason == "wrong_start" and "\n" not in str(error.value)
    assert "dense_channels 16 instead of 24, prefix_attention full instead of causal" in str(error.value)


@pytest.mark.parametrize(
    ("decoder", "change", "words"),
    [
        ("lumen", {"num_heads": 1}, "lumen.num_heads 2 instead of 1"),
        ("grounding_dino", {"inverse_sigmoid_eps": 0.01}, "grounding_dino.inverse_sigmoid_eps 1e-05 instead of 0.01"),
        ("instruct_pix2pix", {"vae": {"scaling_factor": 0.5}}, "instruct_pix2pix.latent_scale 0.18215 instead of 0.5"),
        ("stable_diffusion", {"mapper_heads": 1}, "stable_diffusion.mapper_heads 2 instead of 1"),
        (
            "stable_diffusion",
            {"scheduler": {"prediction_type": "v_prediction"}},
            "stable_diffusion.scheduler.prediction_type epsilon instead of v_prediction",
        ),
    ],
)
def test_a_kept_decoder_reads_its_weights_as_they_were_trained(tmp_path, tokenizer, decoder, change, words):
    """Of what no shape shows; how a decoder learns and answers may be another."""
    source = tiny_settings(**EXPERTS)
    state = dict.fromkeys(["lm"], torch.zeros(1))  # settings are compared before weights are read
    folder = save_model(tmp_path / "experts", state, source, tokenizer, ModelMeta("tiny"))
    own = getattr(source, decoder).model_dump(mode="json")
    other = {key: own[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    with pytest.raises(UserError) as error:
        start_settings(tiny_settings(**EXPERTS | {decoder: own | other}), folder)
    assert error.value.reason == "wrong_start" and words in str(error.value)
    free = {"grounding_dino": EXPERTS["grounding_dino"] | {"dropout": 0.1, "pixels_at_once": 99}}
    free["stable_diffusion"] = EXPERTS["stable_diffusion"] | {"sampler": "EulerDiscreteScheduler", "guidance": 3.0}
    assert start_settings(tiny_settings(**EXPERTS | free), folder).stable_diffusion.guidance == 3.0


def test_another_width_of_a_kept_decoder_is_refused(folder):
    with pytest.raises(UserError, match="the settings need") as error:
        started(folder, lumen={"hidden_size": 32, "num_layers": 1, "num_heads": 2})
    assert error.value.reason == "wrong_size"


def test_lead_tokens_go_with_the_tokenizer(tmp_path, tokenizer):
    settings = tiny_settings(prefix_attention="causal", lead_tokens=(5,))
    state = tiny_model(prefix_attention="causal").state_dict()
    folder = save_model(tmp_path / "lead", state, settings, tokenizer, ModelMeta("tiny"))
    assert start_settings(tiny_settings(prefix_attention="causal"), folder).lead_tokens == (5,)


def test_numbers_that_a_published_llm_has_in_float32_are_the_presets(tmp_path, tokenizer):
    """Some files hold 1e-5 as 9.999999747378752e-06."""
    stored = tiny_settings(published_tokens=90, llm=llm() | {"rms_norm_eps": float(torch.tensor(1e-5))})
    model = build_model(stored, len(tokenizer))
    folder = save_model(tmp_path / "model", model.state_dict(), stored, tokenizer, ModelMeta("tiny"))
    settings = start_settings(tiny_settings(llm=llm() | {"rms_norm_eps": 1e-5}), folder)
    assert settings.llm["rms_norm_eps"] == 9.999999747378752e-06 and settings.published_tokens == 90
    with pytest.raises(UserError, match="rms_norm_eps"):
        start_settings(tiny_settings(llm=llm() | {"rms_norm_eps": 1.1e-5}), folder)


def test_new_link_heads_start_as_those_that_know_the_classes(folder):
    """In the same width, of the same family; those for object and keypoint prompts both."""
    experts = {"unipose": EXPERTS["unipose"], "stable_diffusion": EXPERTS["stable_diffusion"]}
    names = {name for name in tiny_model(**experts).state_dict() if name.startswith("trunk.link_heads.")}
    fresh = {name: t for name, t in tiny_model(**experts).state_dict().items() if name in names}
    taught = taught_heads({n: t for n, t in fresh.items() if ".lumen." not in n}, load_model(folder).model.state_dict())
    assert set(taught) == {name for name in names if ".unipose." in name}
    assert taught["trunk.link_heads.unipose.keypoints.mlp.0.weight"] == "trunk.link_heads.lumen.mlp.0.weight"
    wider = {name: t.repeat_interleave(2, 0) for name, t in fresh.items()}
    assert not taught_heads(wider, load_model(folder).model.state_dict())
