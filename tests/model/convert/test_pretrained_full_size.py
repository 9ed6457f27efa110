"""The 7b preset against the published layouts, in full size on the meta device: what `convert pretrained` puts together
has every key and shape of the model, and what is not published is fresh."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from lumen_ray import config
from lumen_ray.decoders.diffusion.schedulers import learned_schedule, make_scheduler
from lumen_ray.decoders.grounding_dino.published import state_of
from lumen_ray.errors import UserError
from lumen_ray.model.build import WEIGHTS, Generalist, build_decoder
from lumen_ray.model.convert.decoders import loaders
from lumen_ray.model.convert.encoder_rules import CLIP, DINOV2
from lumen_ray.model.convert.pretrained import encoder_state, fill, llm_state, settings_from
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.warm_start import start_settings
from lumen_ray.presets import model_path
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS

# The sizes in the config.json of openai/clip-vit-large-patch14-336, facebook/dinov2-large, lmsys/vicuna-7b-v1.5,
# IDEA-Research/grounding-dino-tiny, stable-diffusion-v1-5 and timbrooks/instruct-pix2pix.
CLIP_L = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
    },
}  # fmt: skip
DINOV2_L = {
    "model_type": "dinov2", "hidden_size": 1024, "mlp_ratio": 4, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 518, "patch_size": 14, "hidden_act": "gelu", "use_swiglu_ffn": False,
}  # fmt: skip
VICUNA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
SWIN_T = {
    "model_type": "grounding-dino",
    "backbone_config": {
        "model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
        "image_size": 224, "out_indices": [2, 3, 4],
    },
    "text_config": {"model_type": "bert"}, "d_model": 256, "encoder_layers": 6, "decoder_layers": 6,
    "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "num_queries": 900, "num_feature_levels": 4, "two_stage": True,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 64,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512,
}  # fmt: skip
TEXT = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
NOISE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}  # fmt: skip
DIFFUSION = {
    "stable_diffusion": {
        "unet": UNET, "vae": VAE, "text_encoder": TEXT,
        "scheduler": NOISE | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True},
    },
    "instruct_pix2pix": {
        "unet": UNET | {"in_channels": 8}, "vae": VAE, "text_encoder": TEXT,
        "scheduler": NOISE | {"_class_name": "EulerAncestralDiscreteScheduler"},
    },
}  # fmt: skip
#: what nobody has published: of the trunk what joins encoders and LLM, and what leads to decoders and feeds the light
#: one; two decoders; of Grounding DINO what makes masks
FRESH = (
    "trunk.vision.clip.merge.",
    "trunk.vision.dinov2.merge.",
    "trunk.vision.dinov2_mlp.",
    "trunk.vision.projector.",
    "trunk.vision.token_norm.",
    "trunk.regions.",
    "trunk.queries.",
    "trunk.link_heads.",
    "trunk.stem.",
    "trunk.dense.",
    "decoders.lumen.",
    "decoders.unipose.",
    "decoders.grounding_dino.mask_head.",
    "decoders.grounding_dino.mask_embed.",
    "decoders.grounding_dino.trunk.backbone.hidden_states_norms.stage1.",
)
ROWS = VICUNA["vocab_size"] + len(SPECIAL_TOKENS) - 1  # Vicuna's own </s> ends an answer


@dataclass
class Published:
    """What `settings_from` reads of a checkpoint."""

    folder: Path
    config: dict


def on_disk(model):
    """Tensors by the names under which `transformers` saves them."""
    return revert_weight_conversion(model, model.state_dict())


@pytest.fixture
def folders(tmp_path):
    """The published configs of the decoders; there are no weights."""
    for name, parts in DIFFUSION.items():
        for part, keys in parts.items():
            (tmp_path / name / part).mkdir(parents=True)
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            (tmp_path / name / part / file).write_text(json.dumps(keys))
    (tmp_path / "grounding_dino").mkdir()
    (tmp_path / "grounding_dino" / "config.json").write_text(json.dumps(SWIN_T))
    return {name: tmp_path / name for name in loaders()}


@pytest.fixture
def no_weights(monkeypatch):
    """`from_pretrained` of what a diffusion folder holds builds by the config alone."""
    for cls in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL):
        monkeypatch.setattr(
            cls, "from_pretrained", lambda folder, subfolder, cls=cls, **_: cls.from_config(read(folder, subfolder))
        )
    monkeypatch.setattr(
        CLIPTextModel,
        "from_pretrained",
        lambda folder, subfolder, **_: CLIPTextModel(CLIPTextConfig(**read(folder, subfolder))),
    )


def read(folder, subfolder):
    return json.loads((Path(folder) / subfolder / "config.json").read_text())


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def model_state(settings):
    with torch.device("meta"):
        return Generalist(settings, ROWS).state_dict()


@pytest.fixture
def preset():
    return config.load(ModelSettings, model_path("7b"))


@pytest.fixture
def converted(preset, folders):
    """The settings that `convert pretrained` writes for the published checkpoints."""
    checkpoints = {"clip": CLIP_L, "dinov2": DINOV2_L, "llm": VICUNA}
    return settings_from(preset, {k: Published(Path(k), v) for k, v in checkpoints.items()}, folders)


def test_the_preset_is_of_the_published_sizes(preset, converted):
    assert shapes(model_state(converted)) == shapes(model_state(preset))
    assert converted.serving == preset.serving
    for name in DIFFUSION:
        ours, theirs = getattr(preset, name), getattr(converted, name)
        told = ("sampler", "image_size", "num_tokens", "train_unet", "train_vae")
        assert all(getattr(ours, key) == getattr(theirs, key) for key in told)
        assert learned_schedule(ours.scheduler) == learned_schedule(theirs.scheduler)
        draws = [dict(make_scheduler(s.sampler, s.scheduler).config) for s in (ours, theirs)]
        for keys in draws:
            del keys["_use_default_values"]  # which keys were given, and not what they are
        assert draws[0] == draws[1]


def test_a_recipe_of_the_preset_starts_from_what_convert_writes(tmp_path, preset, converted):
    """Both describe the same model, though not by the same keys."""

    def written(settings):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        (folder / "meta.json").write_text(json.dumps({"preset": "7b"}))
        for name in ("tokenizer.json", WEIGHTS):
            (folder / name).touch()
        return folder

    assert start_settings(preset, written(converted)) == preset
    narrow = converted.model_copy(update={"llm": converted.llm | {"num_attention_heads": 16}})
    with pytest.raises(UserError, match=r"which has llm.*num_attention_heads 16 instead of 32"):
        start_settings(preset, written(narrow))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_every_key_of_the_preset_is_published_or_fresh(folders, no_weights, capsys):
    """Those of CLIP ViT-L/14-336, DINOv2-L, Vicuna 7B, Grounding DINO Swin-T, Stable Diffusion 1.5 and InstructPix2Pix,
    through the rules of `convert pretrained`: nothing missing, nothing left over, every shape the same."""
    settings = config.load(ModelSettings, model_path("7b"))
    with torch.device("meta"):
        clip, dinov2 = CLIPModel(CLIPConfig(**CLIP_L)), Dinov2Model(Dinov2Config(**DINOV2_L))
        vicuna = on_disk(LlamaForCausalLM(LlamaConfig(**VICUNA)))
        detector = on_disk(GroundingDinoForObjectDetection(GroundingDinoConfig(**SWIN_T)))
        published = {
            "clip": encoder_state(on_disk(clip), CLIP, "trunk.vision.clip.model.", "CLIP"),
            "dinov2": encoder_state(on_disk(dinov2), DINOV2, "trunk.vision.dinov2.model.", "DINOv2"),
            "llm": llm_state(vicuna, VICUNA["vocab_size"], ROWS, tied=False, what="Vicuna"),
        }
        decoders = {
            name: loaders()[name].load(folders[name], partial(build_decoder, settings, name), False)
            for name in DIFFUSION
        }
        decoders["grounding_dino"] = state_of(detector, partial(build_decoder, settings, "grounding_dino"), "Swin-T")
    for name, state in decoders.items():
        published[name] = {f"decoders.{name}.{key}": tensor for key, tensor in state.items()}
    loaded = {name: tensor for state in published.values() for name, tensor in state.items()}
    assert len(loaded) == sum(map(len, published.values()))
    assert len(published["clip"]) == len(clip.vision_model.state_dict())
    assert len(published["dinov2"]) == len(dinov2.state_dict()) and len(published["llm"]) == len(vicuna)

    state = model_state(settings)
    assert shapes(fill(state, loaded, "the checkpoints", FRESH)) == shapes(state)  # raises where they do not fit
    fresh = state.keys() - loaded.keys()
    assert {name for name in fresh if not name.startswith(FRESH)} == set()
    assert {prefix for prefix in FRESH if any(name.startswith(prefix) for name in fresh)} == set(FRESH)
    counts = {part: sum(tensor.numel() for tensor in tensors.values()) for part, tensors in published.items()}
    rest = Counter({".".join(name.split(".")[:2]): 0 for name in fresh})
    for name in fresh:
        rest[".".join(name.split(".")[:2])] += state[name].numel()
    with capsys.disabled():
        for title, numbers in (("published", counts), ("fresh", rest)):
            told = ", ".join(f"{part} {count:,}" for part, count in sorted(numbers.items()))
            print(f"\n7b, {title}: {sum(numbers.values()):,} numbers; {told}", end="")
        print()

    gone = dict(loaded)
    del gone["decoders.instruct_pix2pix.unet.conv_in.weight"]
    with pytest.raises(UserError, match="has no tensor for 'decoders.instruct_pix2pix.unet.conv_in.weight'"):
        fill(state, gone, "the checkpoints", FRESH)


def test_a_decoder_of_the_preset_needs_its_weights(folders):
    preset = config.load(ModelSettings, model_path("7b"))
    checkpoints = {"clip": CLIP_L, "dinov2": DINOV2_L, "llm": VICUNA}
    given = {k: Published(Path(k), v) for k, v in checkpoints.items()}
    del folders["stable_diffusion"]
    with pytest.raises(UserError, match="give its checkpoint with --decoder stable_diffusion=DIR, or set") as error:
        settings_from(preset, given, folders)
    assert error.value.reason == "missing_checkpoint"
