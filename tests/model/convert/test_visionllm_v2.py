"""A whole released checkpoint, tiny: converted, loaded again, the same numbers; every tensor accounted for."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.released_fakes import CLIP, NEW_TOKENS, fixture, part, released_settings
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lumen_ray.checkpoints.rules import ModuleRules, Rule, apply, check_fits
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import Request
from lumen_ray.model.build import load_model
from lumen_ray.model.convert.lora import Merged
from lumen_ray.model.convert.pretrained import llm_state
from lumen_ray.model.convert.visionllm_v2 import REPORT_FILE, convert
from lumen_ray.tasks import family_of
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.sequential import lead_tokens


def tokenizer(ids):
    """Words of the fixture's vocabulary: the new tokens where its json has them, any words elsewhere."""
    told = {"[PAD]": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<region>": ids["reg_token_id"]}
    for name in ("det", "grd", "seg", "pose", "gen", "edit"):
        told[f"[{name.upper()}]"] = ids[f"{name}_tool_id"]
    taken = set(told.values())
    vocabulary = told | {f"word{i}": i for i in range(60) if i not in taken}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in told])
    return backend


@pytest.fixture
def released(test_data, tmp_path):
    """(the weights, a folder with them): the trunk of a fixture and some tensors of decoders."""
    told, data = fixture(test_data, "vl_splice_a")
    weights = part(data, "weights.")
    weights |= {"gdino.level_embed": torch.ones(4, 8), "sd.emb_proj.0.weight": torch.ones(3, 48)}
    folder = tmp_path / "VisionLLMv2"
    folder.mkdir()
    config = {"model_type": "visionllmv2", "vl_bridge_type": "mlp2x_gelu", "num_embs": 4}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(told["config"]["token_ids"]).save(str(folder / "tokenizer.json"))
    return weights, folder


def write(weights, folder, pickled=False):
    names = sorted(weights)
    shards, weight_map = (names[::2], names[1::2]), {}
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    for i, part_names in enumerate(shards):
        shard = f"{stem}-0000{i + 1}-of-00002.{ending}"
        tensors = {name: weights[name].contiguous() for name in part_names}
        torch.save(tensors, folder / shard) if pickled else save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(part_names, shard)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_converted_checkpoint_is_a_model_folder(released, tmp_path, pickled):
    weights, folder = released
    write(weights, folder, pickled)
    if pickled:
        with pytest.raises(UserError) as caught:
            convert(folder, released_settings(), tmp_path / "model")
        assert caught.value.reason == "pickled_weights"
    made, report = convert(folder, released_settings(), tmp_path / "model", pickle=pickled)
    loaded = load_model(tmp_path / "model")
    state = loaded.model.state_dict()
    for theirs, ours in (
        ("vis_encoder.vision_model.post_layernorm.weight", "trunk.vision.clip.model.post_layernorm.weight"),
        ("llm.lm_head.weight", "trunk.llm.lm_head.weight"),
        ("region_encoder.up_dim.bias", "trunk.regions.projector.bias"),
        ("vl_bridge.2.weight", "trunk.vision.projector.2.weight"),
        ("emb_embeddings_det.weight", f"trunk.queries.queries.{family_of('[DET]').name}"),
    ):  # fmt: skip
        assert torch.equal(state[ours], weights[theirs])
    assert loaded.settings.lead_tokens == lead_tokens(loaded.tokenizer, "<s>")
    assert loaded.settings.prompt_layout == "sequential" and loaded.settings.regions.sampling == "corner"
    assert loaded.tokenizer.ids["[DET]"] == 44 and loaded.tokenizer.ids["<eos>"] == 2

    told = json.loads((tmp_path / "model" / REPORT_FILE).read_text())
    assert {entry["name"] for entry in told["tensors"]} == set(weights)
    assert told["counts"] == report.counts() and sum(told["counts"].values()) == len(weights)
    dropped = {entry["name"]: entry["why"] for entry in told["tensors"] if entry["outcome"] == "dropped"}
    assert "grounding_dino" in dropped["gdino.level_embed"]
    assert set(told["fresh"]) == set(made.state) - made.loaded
    assert all(name.split(".")[1] in ("stem", "dense", "link_heads", "lumen") for name in told["fresh"])


def test_the_engine_asks_a_converted_model_in_its_layout(released, tmp_path):
    weights, folder = released
    write(weights, folder)
    convert(folder, released_settings(), tmp_path / "model")
    engine = Engine.load(tmp_path / "model")
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    found = engine.trunk.links([image], [[Request("detect", ("word4", "word5")), Request("vqa", text="word6")]])
    trunk, tokenizer = engine.loaded.model.trunk, engine.loaded.tokenizer
    branches = [Branch(0, f"detect {word}", route="[DET]") for word in ("word4", "word5")]
    layout = build_layout(branches, 1, tokenizer, "sequential")
    prefix = trunk.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    expected = trunk.branch_links(prefix, layout)["lumen"].embeddings
    torch.testing.assert_close(found.decoder_inputs["lumen"].link.embeddings, expected)
    assert isinstance(found.plans[0][1].text, str)


def refused(weights, folder, tmp_path):
    write(weights, folder)
    with pytest.raises(UserError) as caught:
        convert(folder, released_settings(), tmp_path / "model")
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()
    return f"{caught.value.reason}: {caught.value}"


def test_other_layouts_than_the_released_one_are_refused(released, tmp_path):
    weights, folder = released
    assert "unknown_layout" in refused(weights | {"vis_tower.x": torch.ones(1)}, folder, tmp_path)
    assert "incomplete" in refused({k: v for k, v in weights.items() if "up_dim" not in k}, folder, tmp_path)
    assert "wrong_size" in refused(weights | {"vl_bridge.0.bias": torch.ones(7)}, folder, tmp_path)
    (folder / "config.json").write_text(json.dumps({"vl_bridge_type": "internvl_mlp"}))
    assert "only checkpoints with 'mlp2x_gelu'" in refused(weights, folder, tmp_path)


def test_new_tokens_are_those_of_the_reference_in_its_order():
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32000)}, unk_token="w0"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in NEW_TOKENS])
    assert backend.get_vocab_size() == 32026  # rows of the released embedding
    assert [backend.token_to_id(t) - 32000 for t in ("[PAD]", "<region>", "[DET]", "[EDIT]", "[EMB]")] == [
        0,
        3,
        12,
        17,
        18,
    ]


@pytest.mark.parametrize("written", ["peft", "old peft"])
def test_adapters_are_merged_into_their_weights(written):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {k: v for k, v in released_settings().llm.items() if k != "model_type"}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60)).eval()
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"])
    adapted = peft.get_peft_model(plain, settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tensors = {f"llm.{name}": tensor for name, tensor in adapted.state_dict().items()}
    if written == "old peft":
        tensors = {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items()}
    merged = Merged(tensors, alpha=6)
    assert len(merged) == len(list(merged)) and not any("lora" in name for name in merged)
    assert len(merged.merged) == 2 * 2 * 3
    state = llm_state({name.removeprefix("llm."): merged[name] for name in merged}, 60, 60, tied=False, what="LLM")
    again = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60)).eval()
    again.load_state_dict({name.removeprefix("trunk.llm."): tensor for name, tensor in state.items()})
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)


def test_half_an_adapter_is_refused():
    with pytest.raises(UserError, match="only one of its two matrices"):
        Merged({"a.weight": torch.ones(2, 2), "a.lora_A.default.weight": torch.ones(1, 2)}, 1.0)


def test_rules_split_alias_drop_and_report():
    fused = torch.arange(12.0).view(6, 2)
    parts = [ModuleRules("old.", "new.", [
        Rule(r"attn(\d)\.in_proj_weight", (r"layers.\1.q", r"layers.\1.k", r"layers.\1.v")),
        Rule(r"head\.\d", "head"), Rule("index", drop="counted"), Rule("turned", "turned", change=torch.t),
    ])]  # fmt: skip
    tensors = {
        "old.attn0.in_proj_weight": fused, "old.head.0": torch.ones(2), "old.head.1": torch.ones(2),
        "old.index": torch.ones(1), "old.turned": fused, "other": torch.ones(1),
    }  # fmt: skip
    state, report = apply(tensors, parts)
    assert torch.equal(torch.cat([state[f"new.layers.0.{x}"] for x in "qkv"]), fused)
    assert torch.equal(state["new.turned"], fused.T) and state.keys() == {
        "new.layers.0.q", "new.layers.0.k", "new.layers.0.v", "new.head", "new.turned",
    }  # fmt: skip
    outcomes = {entry.name: entry.outcome for entry in report.entries}
    assert list(outcomes.values()) == ["split", "renamed", "alias", "dropped", "renamed", "unknown"]
    with pytest.raises(UserError, match="'other'"):
        report.refuse("checkpoint")
    with pytest.raises(UserError, match="should be another name of 'old.head.0'"):
        apply(tensors | {"old.head.1": torch.zeros(2)}, parts)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    check_fits(apply(meta, parts)[0], state, "meta")
    with pytest.raises(ValueError, match="either"):
        Rule("both", "to", drop="why")


def test_settings_of_the_released_preset_are_those_of_the_reference(test_data):
    from lumen_ray import config
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.presets import model_path

    told = json.loads((test_data / "visionllm_v2" / "config_7b.json").read_text())
    settings = config.load(ModelSettings, model_path("visionllm-v2"))
    for key, value in settings.vision.clip.items():
        assert told["vis_encoder"][key] == value
    for key, value in settings.llm.items():
        assert key == "model_type" or told["llm"][key] == value
    assert settings.regions.channels == told["region_encoder"]["hidden_dim"] and CLIP["patch_size"] == 14
    assert settings.vocab_size == told["llm"]["vocab_size"]
