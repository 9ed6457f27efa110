"""Models small enough for tests, of the same classes as the presets, and batches of synthetic scenes for them."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTokenizer

from lumen_ray.data.batches.collate import BranchSettings, Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, write_manifest
from lumen_ray.input_size import SizeRule
from lumen_ray.keypoints import FIGURE_KEYPOINTS
from lumen_ray.model.build import Generalist, LoadedModel, ModelMeta, build_model, save_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.tasks import LINK_FAMILIES, TASKS, UNDERSTANDING
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.layout import Layout
from lumen_ray.trunk.tokenizer import LumenTokenizer

torch.set_num_threads(1)

SIDE = 64
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
DINOV2 = {"hidden_size": 16, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}


def llm(model_type: str = "llama") -> dict[str, Any]:
    keys = {
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return keys | ({"head_dim": 16} if model_type == "qwen3" else {})


def tiny_settings(**changes: Any) -> ModelSettings:
    """Nano's classes with tiny widths; `changes` replace top-level keys."""
    data = {
        "name": "tiny",
        "image_size": SIDE,
        "vision": {"clip": CLIP, "dinov2": DINOV2, "mlp_ratio": 2},
        "llm": llm(),
        "prefix_attention": "full",
        "stem_channels": 8,
        "dense_channels": 16,
        "link_channels": 32,
        "link_reads_words": True,
        "tokens_read_stem": True,
        "vocab_size": 320,
        "lumen": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }
    return ModelSettings.model_validate(data | changes)


_DINO = {
    "backbone": {
        "image_size": SIDE, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
        "drop_path_rate": 0.0,
    },
    "hidden_size": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn": 64, "decoder_ffn": 64,
    "num_queries": 20, "fusion_drop_path": 0.0,
}  # fmt: skip
_UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "cross_attention_dim": 16,
    "attention_head_dim": 2, "norm_num_groups": 4, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
_VAE = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
}  # fmt: skip
_DIFFUSION = {
    "image_size": 16, "max_image_size": 64, "vae": _VAE, "num_tokens": 6, "mapper_heads": 2, "train_unet": True,
    "train_vae": True,
}  # fmt: skip
#: the sections of expert decoders in a model's settings, as small as they can be
EXPERTS = {
    "grounding_dino": {**_DINO, "mask_channels": 16},
    "unipose": {**_DINO, "box_layers": 1, "num_instances": 5},
    "stable_diffusion": {**_DIFFUSION, "unet": _UNET},
    "instruct_pix2pix": {**_DIFFUSION, "unet": {**_UNET, "in_channels": 8}},
}  # fmt: skip


@lru_cache
def tiny_tokenizer() -> LumenTokenizer:
    texts = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "figure")]
    return LumenTokenizer.train(texts * 3 + [t for task in TASKS.values() for t in task.templates], 320, LINK_FAMILIES)


@lru_cache
def clip_tokenizer() -> CLIPTokenizer:
    """Letters, two merges and the special tokens of CLIP's, which come last, as in the published vocabulary."""
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [("r", "e"), ("re", "d</w>")])


def captioning_tokenizer(length: int) -> LumenTokenizer:
    """`tiny_tokenizer` with that of a text encoder of `length` positions."""
    captions = Tokenizer.from_str(clip_tokenizer().backend_tokenizer.to_str())
    end = clip_tokenizer().eos_token_id
    captions.enable_truncation(length)
    captions.enable_padding(pad_id=end, pad_token="<|endoftext|>", length=length)
    return LumenTokenizer(tiny_tokenizer().backend, captions=captions)


def tiny_model(seed: int = 0, **changes: Any) -> Generalist:
    return build_model(tiny_settings(**changes), len(tiny_tokenizer()), seed)


def tiny_loaded(seed: int = 0, **changes: Any) -> LoadedModel:
    """What `load_model` gives for a folder of a tiny model."""
    skeletons = {"figure": list(FIGURE_KEYPOINTS), "red figure": list(FIGURE_KEYPOINTS)}
    meta = ModelMeta("tiny", classes=["red circle", "blue square"], skeletons=skeletons)
    return LoadedModel(tiny_model(seed, **changes).eval(), tiny_settings(**changes), tiny_tokenizer(), meta, "0" * 12)


def answering(loaded: LoadedModel) -> LoadedModel:
    """The model with a tokenizer in which "yes" and "no" are words; in `tiny_tokenizer` they begin alike."""
    texts = [*(t for task in TASKS.values() for t in task.templates), *["yes", "no", "does show"] * 50]
    tokenizer = LumenTokenizer.train(texts, len(tiny_tokenizer()), LINK_FAMILIES)
    assert len(tokenizer) == len(tiny_tokenizer())
    return replace(loaded, tokenizer=tokenizer)


def tiny_folder(folder: Path, **changes: Any) -> Path:
    """The folder of such a model."""
    loaded = tiny_loaded(**changes)
    return save_model(folder, loaded.model.state_dict(), loaded.settings, loaded.tokenizer, loaded.meta)


def exemplar_folder(folder: Path, **changes: Any) -> Path:
    """The folder of such a model that takes classes by example."""
    loaded = tiny_loaded(**changes)
    meta = replace(loaded.meta, reads_exemplars=True)
    return save_model(folder, loaded.model.state_dict(), loaded.settings, loaded.tokenizer, meta)


def scene_batch(
    rows: list[dict[str, Any]] | int = 2,
    tasks: tuple[str, ...] = UNDERSTANDING,
    branches: BranchSettings = BranchSettings(),  # noqa: B008  frozen
    seed: int = 0,
    sizes: dict[str, SizeRule] | None = None,
) -> TrainingBatch:
    """The training batch of some synthetic scenes; `sizes`: input rules of decoders, by default of `EXPERTS`."""
    rows = [scenes.scene_row(seed, i, SIDE) for i in range(rows)] if isinstance(rows, int) else rows
    sizes = tiny_settings(**EXPERTS).input_rules if sizes is None else sizes
    collator = Collator(tiny_tokenizer(), SIDE, tasks, scenes.SKELETONS, branches, input_rules=sizes)
    images = [None if row["image"] is None else decode(row["image"]) for row in rows]
    rngs = [np.random.default_rng((seed, i)) for i in range(len(rows))]
    return collator(rows, images, rngs, further=[further_images(row) for row in rows])


def further_images(row: dict[str, Any]) -> list[np.ndarray]:
    """The images of a row beyond its first, uint8 [H, W, 3] each."""
    return [decode(image["image"]) for image in row["further_images"]]


def plain_batch(images: Tensor, layout: Layout, **fields: Any) -> TrainingBatch:
    """A batch of images [B, 3, H, W] and a layout, without targets or regions unless they are given."""
    none = {"region_masks": torch.zeros(0), "region_images": torch.zeros(0, dtype=torch.int64)}
    defaults = {"has_image": torch.ones(len(images), dtype=torch.bool), "tasks": [], "targets": {}}
    extents = torch.tensor([tuple(images.shape[-2:])] * len(images))
    return TrainingBatch(images=images, extents=extents, layout=layout, **none | defaults | fields)


def mixed_shards(folder: Path) -> Path:
    """48 pictures of three shapes, each with a box over all of it, and 12 texts, shuffled, in row groups of 5."""
    rows = []
    for i in range(48):
        height, width = [(64, 40), (40, 64), (64, 64)][i % 3]
        picture = Image.fromarray(decode(scenes.scene_row(0, i, SIDE)["image"])[:height, :width])
        picture.save(buffer := io.BytesIO(), "PNG")
        instance = {
            "phrase": "red circle", "box": [0.0, 0.0, float(width), float(height)], "mask": None, "keypoints": None,
            "crowd": False, "area": float(width * height),
        }  # fmt: skip
        columns = {"tasks": ["detect"], "classes": ["red circle"], "instances": [instance]}
        rows.append(make_row(f"picture-{i}", buffer.getvalue(), (height, width), "test", **columns))
    for i in range(12):
        messages = [make_message("chat", f"what is {i} ?", "a red circle " * (1 + 3 * i))]
        rows.append(make_row(f"text-{i}", None, (0, 0), "test", tasks=["chat"], messages=messages))
    with ShardWriter(folder, "part.parquet", rows_per_group=5) as writer:
        for i in np.random.default_rng(0).permutation(len(rows)):
            writer.write(rows[i])
    categories = [{"name": name, "keypoints": [], "skeleton": []} for name in scenes.CLASSES]
    write_manifest(folder, build_manifest([writer.entry], categories=categories))
    return folder


def random_images(count: int, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    """uint8 [count, 3, side, side]."""
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def scrambled(module: torch.nn.Module, std: float = 0.1, seed: int = 1) -> Any:
    """Noise on every parameter: fresh zeros, ones and tiny weights would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return module.eval()
