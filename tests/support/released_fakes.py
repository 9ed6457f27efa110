"""Tiny checkpoints in published layouts, and what the known-answer fixtures need."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lumen_ray import config
from lumen_ray.model.settings import ModelSettings
from support.tiny_models import llm

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14,
        "image_size": 56}  # fmt: skip
NEW_TOKENS = [
    "[PAD]",
    "<image>",
    "<im_patch>",
    "<region>",
    "<img>",
    "</img>",
    "<reg>",
    "</reg>",
    "<det>",
    "</det>",
    "<grd>",
    "</grd>",
    "[DET]",
    "[GRD]",
    "[SEG]",
    "[POSE]",
    "[GEN]",
    "[EDIT]",
    "[EMB]",
    "[EMB2]",
    "[EMB3]",
    "[EMB4]",
    "[EMB5]",
    "[EMB6]",
    "[EMB7]",
    "[EMB8]",
]


def fixture(test_data: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(json, tensors) of a known-answer fixture of the VisionLLM v2 reference."""
    folder = test_data / "visionllm_v2" / "fixtures"
    if not folder.is_dir():
        import pytest

        pytest.skip(f"no known answers at {folder}")
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def released_settings(**changes) -> ModelSettings:
    """The released layout at the sizes of the fixtures."""
    data = {
        "name": "tiny-released", "image_size": 56,
        "vision": {"clip": CLIP, "bridge": "mlp2x_gelu", "clip_layers": "penultimate"},
        "regions": {"kind": "levels", "channels": 256, "sampling": "corner"},
        "llm": llm() | {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
                        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        "prompt_layout": "sequential", "stem_channels": 8, "dense_channels": 16, "link_channels": 32,
        "lumen": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }  # fmt: skip
    return config.validate(ModelSettings, data | changes, "released")


def llama_tokenizer(words: str) -> Tokenizer:
    """Like Llama's: <unk>, <s>, </s>, bytes, then pieces of `words`; sequences begin with <s>."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{i:02X}>" for i in range(256)] + ["\u2581"] + sorted(set("".join(words.split()))):
        pieces.setdefault(token, len(pieces))
    merges = []
    for word in words.split():
        left = "\u2581"
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            pieces.setdefault(left, len(pieces))
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def gpt_tokenizer() -> Tokenizer:
    """Like Qwen's: bytes and nothing else, `<|endoftext|>` ends a text, nothing begins one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return tokenizer
