"""`lumen-ray convert`: what it prints, what it refuses."""

import pytest
import torch
from support.tiny_models import EXPERTS, captioning_tokenizer, tiny_settings, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lumen_ray import cli
from lumen_ray.model.build import load_model
from lumen_ray.model.convert.command import summary
from lumen_ray.model.convert.pretrained import Assembly

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16,
        "image_size": 64}  # fmt: skip
LLM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
       "num_key_value_heads": 1}  # fmt: skip
PRESET = """
name: tiny
image_size: 64
vision: {clip: {patch_size: 16}}
llm: {model_type: llama}
stem_channels: 8
dense_channels: 16
lumen: {hidden_size: 16, num_layers: 1, num_heads: 2}
"""


def small_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.fixture
def published(tmp_path):
    """A preset, a CLIP and an LLM."""
    torch.manual_seed(0)
    (tmp_path / "tiny.yaml").write_text(PRESET)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
    LlamaForCausalLM(LlamaConfig(**LLM, vocab_size=256)).save_pretrained(tmp_path / "llm")
    small_tokenizer().save(str(tmp_path / "llm" / "tokenizer.json"))
    return tmp_path


def command(folder, *more):
    preset, clip, llm = (str(folder / name) for name in ("tiny.yaml", "clip", "llm"))
    return ["convert", "pretrained", "--preset", preset, "--clip", clip, "--llm", llm, str(folder / "model"), *more]


def test_a_model_is_put_together(published, capsys):
    assert cli.main(command(published)) == 0
    told = capsys.readouterr().out
    loaded = load_model(published / "model")
    counted = sum(p.numel() for p in loaded.model.trunk.llm.parameters())
    assert any("trunk.llm" in line and f"{counted:,} from checkpoints" in line for line in told.splitlines())
    total = sum(t.numel() for t in loaded.model.state_dict().values())
    last = next(line for line in told.splitlines() if "in all" in line).split()
    assert int(last[2].replace(",", "")) + int(last[5].replace(",", "")) == total

    assert cli.main(command(published)) == 2  # a model is not overwritten
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_missing_caption_alignment_is_reported():
    section = EXPERTS["stable_diffusion"] | {"text_encoder": {"hidden_size": 16, "max_position_embeddings": 6}}
    settings, state = tiny_settings(stable_diffusion=section), {"trunk.llm.x": torch.zeros(3)}
    told = "no tokenizer came for the text encoder of stable_diffusion"
    assert told in summary(Assembly(settings, tiny_tokenizer(), state, set()))[-1]
    assert told not in summary(Assembly(settings, captioning_tokenizer(6), state, set()))[-1]
    assert told not in summary(Assembly(tiny_settings(), tiny_tokenizer(), state, set()))[-1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--decoder", "lumen"], "must be NAME=DIR"),
        (["--decoder", "lumen=x"], "no published weights are known for decoder 'lumen'"),
        (["--dinov2", "clip-of-mine"], "'clip-of-mine' is not a folder"),
        (["--allow-pickel"], "--allow-pickel"),
    ],
)
def test_mistakes_are_a_sentence(published, capsys, more, says):
    assert cli.main(command(published, *more)) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1 and not (published / "model").exists()


def test_a_folder_that_is_no_released_checkpoint(published, capsys):
    argv = ["convert", "visionllm-v2", str(published / "llm"), str(published / "model")]
    assert cli.main(argv) == 2
    assert "is not a VisionLLM v2 checkpoint: the tokenizer lacks the special tokens" in capsys.readouterr().err
    assert cli.main(["convert"]) == 2
