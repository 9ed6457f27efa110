"""Models put together from tiny checkpoints, saved by the classes that published ones are."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.chat_templates import FAMILIES, renderer
from support.released_fakes import CLIP, gpt_tokenizer, llama_tokenizer
from support.tiny_models import DINOV2, random_images, tiny_settings
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lumen_ray.checkpoints.hub import Checkpoint, fetch
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import load_model
from lumen_ray.model.convert.encoder_rules import DINOV2 as DINOV2_RULES
from lumen_ray.model.convert.pretrained import Sources, assemble, encoder_state, settings_from
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.tokenizer import EOS, PAD, SPECIAL_TOKENS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip
LLMS = {
    "llama": (LlamaConfig, {"rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "mistral": (MistralConfig, {"head_dim": 8}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}


def preset(**vision):
    return tiny_settings(
        image_size=56, vision={"clip": CLIP, "dinov2": DINOV2 | {"patch_size": 14}, "mlp_ratio": 2} | vision,
        prefix_attention="causal", lumen={"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One published checkpoint of each kind."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                          vocab_size=40, bos_token_id=1, eos_token_id=2)  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=CLIP)).save_pretrained(root / "clip")
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(root / "tower")
    dinov2 = Dinov2Config(**DINOV2 | {"patch_size": 14, "image_size": 98, "num_hidden_layers": 3})
    Dinov2Model(dinov2).save_pretrained(root / "dinov2")
    for kind, (config_class, keys) in LLMS.items():
        tokenizer = gpt_tokenizer() if kind.startswith("qwen") else llama_tokenizer("red cat dog")
        told = {"eos_token": "<|endoftext|>"} if kind.startswith("qwen") else {"eos_token": {"content": "</s>"}}
        # more rows than tokens, as many published models have
        model = AutoModelForCausalLM.from_config(
            config_class(**SIZES | keys, vocab_size=tokenizer.get_vocab_size() + 9)
        )
        model.save_pretrained(root / kind)
        tokenizer.save(str(root / kind / "tokenizer.json"))
        (root / kind / "tokenizer_config.json").write_text(json.dumps(told))
    return root


@pytest.mark.parametrize("kind,clip", [("llama", "clip"), ("mistral", "tower"), ("qwen2", "clip"), ("qwen3", "tower")])
def test_a_model_of_published_modules_computes_the_same_as_them(folders, tmp_path, kind, clip):
    sources = Sources(folders / kind, folders / clip, folders / "dinov2")
    made = assemble(preset(), sources, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    trunk, tokenizer = loaded.model.trunk, loaded.tokenizer

    images = torch.rand(1, 3, 56, 56)
    normalised = (images - trunk.vision.clip.mean) / trunk.vision.clip.std
    theirs = CLIPVisionModel.from_pretrained(folders / clip).eval()
    with torch.no_grad():
        expected = theirs(normalised).last_hidden_state
        torch.testing.assert_close(trunk.vision.clip.model(normalised).last_hidden_state, expected)
        dinov2 = Dinov2Model.from_pretrained(folders / "dinov2").eval()
        torch.testing.assert_close(
            trunk.vision.dinov2.model(images).last_hidden_state, dinov2(images).last_hidden_state
        )
        assert loaded.settings.vision.dinov2["num_hidden_layers"] == 3  # the checkpoint's, not the preset's

        llm = AutoModelForCausalLM.from_pretrained(folders / kind).eval()
        ids = torch.tensor([list(tokenizer.encode("red cat"))])
        torch.testing.assert_close(trunk.llm(ids).logits[..., :100], llm(ids).logits[..., :100])
    known = llm.config.vocab_size - 9
    rows = trunk.llm.get_input_embeddings().weight
    old = llm.get_input_embeddings().weight[:known]
    assert len(rows) == len(tokenizer) == trunk.llm.lm_head.weight.shape[0] >= known + len(SPECIAL_TOKENS) - 2
    torch.testing.assert_close(rows[:known], old)
    torch.testing.assert_close(rows[known:], old.mean(0).expand(len(rows) - known, -1))
    assert (trunk.llm.lm_head.weight is rows) == (kind == "qwen2")
    with torch.no_grad():
        read, _, _ = trunk.extract_features(images)
    tokens = read[:, len(loaded.settings.lead_tokens) :]
    torch.testing.assert_close(tokens.square().mean().sqrt(), old.square().mean().sqrt(), rtol=0.01, atol=0)

    own = {"qwen2": "<|endoftext|>", "qwen3": "<|endoftext|>"}.get(kind, "</s>")
    assert tokenizer.ids[EOS] == tokenizer.backend.token_to_id(own) and tokenizer.ids[PAD] >= known
    assert loaded.settings.lead_tokens == (() if kind.startswith("qwen") else (1,))
    assert loaded.settings.published_tokens == known
    counted = made.parameters()
    assert counted["trunk.llm"][1] == 0 and counted["trunk.regions"][0] == 0
    assert counted["trunk.vision"][0] > 0 and counted["trunk.vision"][1] > 0
    # and it runs
    layout = build_layout([Branch(0, "detect red cat", route="[DET]")], 1, tokenizer)
    hidden, _ = trunk.run_branches(trunk.encode(random_images(1, 56)), layout)
    assert hidden.isfinite().all()


def test_a_giant_dinov2_with_swiglu_layers(tmp_path):
    theirs = Dinov2Model(Dinov2Config(**DINOV2 | {"image_size": 64, "patch_size": 8, "use_swiglu_ffn": True})).eval()
    theirs.save_pretrained(tmp_path)
    settings = preset().model_copy(update={"vision": preset().vision.model_copy(update={"clip": None})})
    read = settings_from(settings, {"dinov2": Checkpoint(tmp_path), "llm": _llm_config(tmp_path / "llm")})
    ours = Dinov2Model(Dinov2Config(**read.vision.dinov2)).eval()
    ours.load_state_dict(encoder_state(Checkpoint(tmp_path), DINOV2_RULES, "", "DINOv2"))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).last_hidden_state, theirs(images).last_hidden_state)


def _llm_config(folder):
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=20)).save_pretrained(folder)
    return Checkpoint(folder)


def test_the_same_seed_gives_the_same_fresh_weights(folders, tmp_path):
    sources = Sources(folders / "llama", folders / "clip", folders / "dinov2")
    first, again, other = (
        assemble(preset(), sources, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    name = "trunk.queries.queries.perception"
    assert name not in first.loaded
    assert torch.equal(first.state[name], again.state[name]) and not torch.equal(first.state[name], other.state[name])


def test_shards_and_pickled_weights(folders, tmp_path):
    whole = load_file(folders / "llama" / "model.safetensors")
    for kind in ("safe", "pickled"):
        shutil.copytree(folders / "llama", tmp_path / kind)
        (tmp_path / kind / "model.safetensors").unlink()
        stem, ending = ("model", "safetensors") if kind == "safe" else ("pytorch_model", "bin")
        names, weight_map = sorted(whole), {}
        for i, part in enumerate((names[:5], names[5:])):
            shard = f"{stem}-0000{i + 1}-of-00002.{ending}"
            tensors = {name: whole[name] for name in part}
            save_file(tensors, tmp_path / kind / shard) if kind == "safe" else torch.save(
                tensors, tmp_path / kind / shard
            )
            weight_map |= dict.fromkeys(part, shard)
        (tmp_path / kind / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path / "pickled")
    assert caught.value.reason == "pickled_weights" and "--allow-pickle" in str(caught.value)
    for read in (Checkpoint(tmp_path / "safe"), Checkpoint(tmp_path / "pickled", pickle=True)):
        assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)
    (tmp_path / "safe" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path / "safe")
    assert caught.value.reason == "missing_shard" and "model-00002-of-00002.safetensors" in str(caught.value)


def test_code_in_pickled_weights_is_not_run(folders, tmp_path):
    class Danger:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    shutil.copytree(folders / "llama", tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Danger()}, tmp_path / "bad" / "pytorch_model.bin")
    with pytest.raises(UserError, match="damaged"):
        Checkpoint(tmp_path / "bad", pickle=True)
    assert not (tmp_path / "ran").exists()


def refused(folders, tmp_path, settings=None, **sources):
    given = {"llm": folders / "llama", "clip": folders / "clip", "dinov2": folders / "dinov2"} | sources
    with pytest.raises(UserError) as caught:
        assemble(settings or preset(), Sources(**given), tmp_path / "model")
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()
    return f"{caught.value.reason}: {caught.value}"


def test_each_mistake_raises_a_user_error(folders, tmp_path):
    assert "missing_checkpoint" in refused(folders, tmp_path, clip=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "not_a_checkpoint" in refused(folders, tmp_path, llm=tmp_path / "empty")
    assert "of type 'llama', not a CLIP vision tower" in refused(folders, tmp_path, clip=folders / "llama")
    assert "of type 'clip', not a causal LM" in refused(folders, tmp_path, llm=folders / "clip")
    assert "give its checkpoint with --dinov2" in refused(folders, tmp_path, dinov2=None)
    assert "unknown_decoder" in refused(folders, tmp_path, decoders={"pinocchio": folders / "clip"})

    Dinov2Model(Dinov2Config(**DINOV2 | {"patch_size": 8, "image_size": 56})).save_pretrained(tmp_path / "eight")
    told = refused(folders, tmp_path, dinov2=tmp_path / "eight")
    assert "wrong_patch_size" in told and "14 pixels" in told and "8 pixels" in told

    shutil.copytree(folders / "llama", tmp_path / "short")
    tensors = load_file(tmp_path / "short" / "model.safetensors")
    missing = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    save_file(missing, tmp_path / "short" / "model.safetensors")
    assert "incomplete_checkpoint" in refused(folders, tmp_path, llm=tmp_path / "short")
    save_file(tensors | {"model.extra.weight": torch.ones(2)}, tmp_path / "short" / "model.safetensors")
    assert "which the model lacks" in refused(folders, tmp_path, llm=tmp_path / "short")
    save_file(tensors | {"visual.thing": torch.ones(2)}, tmp_path / "short" / "model.safetensors")
    assert "unknown_layout" in refused(folders, tmp_path, llm=tmp_path / "short")
    save_file(tensors | {"model.norm.weight": torch.ones(2)}, tmp_path / "short" / "model.safetensors")
    assert "wrong_size" in refused(folders, tmp_path, llm=tmp_path / "short")
    cut = {k: v[:50] if "embed" in k or "lm_head" in k else v for k, v in tensors.items()}
    save_file(cut, tmp_path / "short" / "model.safetensors")
    assert "wrong_tokenizer" in refused(folders, tmp_path, llm=tmp_path / "short")
    (tmp_path / "short" / "model.safetensors").write_bytes(b"no weights")
    assert "damaged_checkpoint" in refused(folders, tmp_path, llm=tmp_path / "short")


def test_a_hub_id_is_downloaded_and_failures_raise_user_errors(folders, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        if name == "nobody/nothing":
            raise OSError("no such repository\nand more")
        return str(folders / "clip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("openai/clip", pickle=True) == folders / "clip" and "*.bin" in asked["openai/clip"]
    assert fetch("openai/other") == folders / "clip" and "*.bin" not in asked["openai/other"]
    with pytest.raises(UserError, match="cannot be downloaded: no such repository$"):
        fetch("nobody/nothing")
    with pytest.raises(UserError, match="is not a folder"):
        fetch("./a/b")


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "list"])
def test_an_llm_with_a_chat_template_answers_as_by_itself(folders, tmp_path, where):
    """Text alone: the tokens of `transformers` generate on the template's conversation, alone and beside others."""
    template, _, eos, others = FAMILIES["qwen2"]
    source = tmp_path / "llm"
    tokenizer = gpt_tokenizer()
    tokenizer.add_special_tokens([eos, *others[:1]])
    told = {"eos_token": eos}
    if where == "tokenizer_config.json":
        told["chat_template"] = template
    elif where == "list":
        told["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    torch.manual_seed(3)
    config = Qwen2Config(
        **SIZES, tie_word_embeddings=True, vocab_size=tokenizer.get_vocab_size(), initializer_range=0.5
    )
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.generation_config.eos_token_id = [tokenizer.token_to_id(eos), tokenizer.token_to_id("!")]
    theirs.save_pretrained(source)
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(told))
    if where == "chat_template.jinja":
        (source / where).write_text(template)
    made = assemble(preset(), Sources(source, folders / "clip", folders / "dinov2"), tmp_path / "model")
    engine = Engine.load(tmp_path / "model")
    ours = engine.loaded.tokenizer
    assert ours.turns.stops == (eos, "!")
    assert engine.loaded.settings.lead_tokens == ours.encode(ours.turns.begin)

    conversation = [("user", "red?"), ("assistant", "cat."), ("user", "dog?")]
    rendered = renderer(template, None, eos)([{"role": role, "content": text} for role, text in conversation])
    ids = torch.tensor([tokenizer.encode(rendered, add_special_tokens=False).ids])
    with torch.no_grad():
        new = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    expected = ours.decode(t for t in new.tolist() if t not in ours.end_ids)
    request = make_request("chat", text="dog?", history=[("red?", "cat.")])
    answers = engine.run([None], [[request]], max_new_tokens=12)
    assert answers[0][0].text == expected
    others_too = [[make_request("caption")], [request], [make_request("chat", text="a longer question ?")]]
    answers = engine.run([np.zeros((56, 56, 3), np.uint8), None, None], others_too, max_new_tokens=12)
    assert answers[1][0].text == expected
    # the embedding is stored and counted once
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert "trunk.llm.lm_head.weight" not in stored and "trunk.llm.model.embed_tokens.weight" in stored
    llm = engine.trunk.trunk.llm
    assert llm.lm_head.weight is llm.get_input_embeddings().weight
    assert sum(made.parameters()["trunk.llm"]) == sum(p.numel() for p in llm.parameters())


def test_a_folder_that_stores_tied_weights_twice_still_opens(folders, tmp_path):
    assemble(preset(), Sources(folders / "qwen2", folders / "clip", folders / "dinov2"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    state["trunk.llm.lm_head.weight"] = state["trunk.llm.model.embed_tokens.weight"].clone()
    save_file(state, path)
    llm = load_model(tmp_path / "model").model.trunk.llm
    assert llm.lm_head.weight is llm.get_input_embeddings().weight


def test_a_template_that_is_no_fixed_texts_stops_the_conversion(folders, tmp_path):
    source = shutil.copytree(folders / "llama", tmp_path / "llm")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="the LLM's chat template cannot be expressed as fixed texts"):
        assemble(preset(), Sources(source, folders / "clip", folders / "dinov2"), tmp_path / "model")
    assert not (tmp_path / "model").exists()
