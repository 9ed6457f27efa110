"""Published weights of the expert decoders in a model put together from checkpoints."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.released_fakes import CLIP, llama_tokenizer
from support.tiny_models import EXPERTS, clip_tokenizer, llm, tiny_settings
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
)

from lumen_ray import config
from lumen_ray.decoders.grounding_dino.published import state_of
from lumen_ray.errors import UserError
from lumen_ray.model.build import build_decoder, load_model
from lumen_ray.model.convert.decoders import caption_tokenizer
from lumen_ray.model.convert.pretrained import Sources, assemble, blank
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path

SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "cross_attention_dim": 16,
    "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 56, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def grounding_dino(folder):
    text = BertConfig(vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage2", "stage3", "stage4"]), text_config=text,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20, max_text_len=16,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 96, "longest_edge": 160}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "do_resize": True}))


def stable_diffusion(folder):
    diffusers = pytest.importorskip("diffusers")
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(folder / "text_encoder")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    clip_tokenizer().save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(root / "clip")
    tokenizer = llama_tokenizer("red cat dog")
    sizes = {k: v for k, v in llm().items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tokenizer.get_vocab_size())).save_pretrained(root / "llm")
    tokenizer.save(str(root / "llm" / "tokenizer.json"))
    grounding_dino(root / "gdino")
    stable_diffusion(root / "sd")
    return root


def preset():
    """Sizes that differ from the checkpoints, which take precedence; other settings come from the preset."""
    painter = {"image_size": 32, "unet": {"in_channels": 4}, "vae": {}, "mapper_heads": 2}
    return tiny_settings(
        image_size=56, vision={"clip": CLIP}, prefix_attention="causal", lumen=None, tokens_read_stem=False,
        grounding_dino={"mask_points": 16, "num_queries": 5}, stable_diffusion=painter, link_reads_words=False,
    )  # fmt: skip


def make(folders, output, **decoders):
    given = {"grounding_dino": folders / "gdino", "stable_diffusion": folders / "sd"} | decoders
    return assemble(preset(), Sources(folders / "llm", folders / "clip", None, given), output)


def test_decoders_get_the_published_numbers(folders, tmp_path):
    made = make(folders, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    detector, painter = (loaded.model.decoders[name] for name in ("grounding_dino", "stable_diffusion"))
    theirs = load_file(folders / "gdino" / "model.safetensors")
    torch.testing.assert_close(
        detector.trunk.query_position_embeddings.weight, theirs["model.query_position_embeddings.weight"]
    )
    assert loaded.settings.grounding_dino.num_queries == 20 and loaded.settings.grounding_dino.mask_points == 16
    assert loaded.settings.grounding_dino.input_size == (96, 160)
    unet = load_file(folders / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, unet[name]) for name, tensor in painter.unet.state_dict().items())
    assert loaded.settings.stable_diffusion.num_tokens == 6 and loaded.settings.stable_diffusion.mapper_heads == 2
    ids = clip_tokenizer()(["a red cat"], padding="max_length", truncation=True, max_length=6).input_ids
    assert loaded.tokenizer.caption_ids(["a red cat"]).tolist() == ids
    fresh = {name for name in made.state if name.startswith("decoders.") and name not in made.loaded}
    assert {name.split(".")[2] for name in fresh} <= {"mask_head", "mask_embed", "link_proj", "trunk"}
    assert all("stage1" in name for name in fresh if name.split(".")[2] == "trunk")


def test_decoders_that_do_not_fit_raise_user_errors(folders, tmp_path):
    def refused(**decoders):
        with pytest.raises(UserError) as caught:
            make(folders, tmp_path / "model", **decoders)
        assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()
        return f"{caught.value.reason}: {caught.value}"

    assert "not grounding-dino" in refused(grounding_dino=folders / "clip")
    assert "unet/config.json is missing" in refused(stable_diffusion=folders / "clip")
    assert "preset 'tiny' has no decoder 'instruct_pix2pix'" in refused(instruct_pix2pix=folders / "sd")
    shutil.copytree(folders / "sd", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer"))
    assert "missing_tokenizer" in refused(stable_diffusion=tmp_path / "mute")
    shutil.copytree(folders / "sd", tmp_path / "wordy")
    more = CLIPTokenizer(clip_tokenizer().get_vocab() | {"cat</w>": 56}, [])
    more.save_pretrained(tmp_path / "wordy" / "tokenizer")
    told = refused(stable_diffusion=tmp_path / "wordy")
    assert "gives 6 ids below 57, but stable_diffusion.text_encoder takes 6 below 56" in told
    shutil.copytree(folders / "gdino", tmp_path / "short")
    weights = load_file(tmp_path / "short" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "enc_output_norm" not in k}, tmp_path / "short" / "model.safetensors"
    )
    assert "incomplete_checkpoint" in refused(grounding_dino=tmp_path / "short")
    told = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(told | {"num_queries": 21}))
    save_file(weights, tmp_path / "short" / "model.safetensors")
    assert "wrong_size" in refused(grounding_dino=tmp_path / "short")


def test_decoders_share_one_tokenizer_of_captions(folders, tmp_path):
    def of_both(other):
        return caption_tokenizer({"stable_diffusion": folders / "sd", "instruct_pix2pix": other})

    assert of_both(folders / "sd").encode("red").ids[1] == 53
    assert caption_tokenizer({"grounding_dino": folders / "gdino"}) is None
    other = shutil.copytree(folders / "sd", tmp_path / "other")
    vocabulary = clip_tokenizer().get_vocab()
    for changed, what in (({"pad_token": "z"}, "padding"), ({"vocab": vocabulary | {"a": 1, "b": 0}}, "vocabularies")):
        CLIPTokenizer(**{"vocab": vocabulary, "merges": [("r", "e"), ("re", "d</w>")]} | changed).save_pretrained(
            other / "tokenizer"
        )
        with pytest.raises(UserError, match=f"stable_diffusion and instruct_pix2pix have different {what}") as error:
            of_both(other)
        assert error.value.reason == "wrong_tokenizer" and "\n" not in str(error.value)


def test_grounding_dino_in_full_size():
    """Swin-T's, as `transformers` has it, on the meta device: every key and shape of the decoder."""
    settings = config.load(ModelSettings, model_path("visionllm-v2"))
    swin = SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    with torch.device("meta"):
        tensors = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin)).state_dict()
    build = partial(build_decoder, settings, "grounding_dino")
    state = state_of(tensors, build, "Swin-T")
    assert state["trunk.query_position_embeddings.weight"].shape == (900, 256)
    with pytest.raises(UserError, match="incomplete"):
        state_of({k: v for k, v in tensors.items() if "enc_output." not in k}, build, "incomplete")


def test_published_modules_are_not_initialised_first():
    """It would take minutes, and as much memory, before the checkpoint's numbers take its place."""
    state = blank(tiny_settings(**EXPERTS), 320, seed=0)
    later = {name for name, tensor in state.items() if tensor.is_meta}
    for part in ("decoders.stable_diffusion.unet.", "decoders.stable_diffusion.vae.", "trunk.llm."):
        named = {name for name in state if name.startswith(part)}
        assert named and named <= later
    assert not any(name.startswith(("decoders.grounding_dino.", "trunk.link_heads.")) for name in later)
