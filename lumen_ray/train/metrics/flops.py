"""Floating-point operations (FLOPs) of a training step by component, from shapes, and the peak rates of GPUs.

A multiplication and an addition count as two. Only matrix products and convolutions are counted, as is usual for model
FLOPs utilisation (arXiv 2204.02311, app. B); recomputation by activation checkpointing is not. Each decoder counts its
FLOPs itself (`DecoderSpec.flops`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lumen_ray.decoders.base import Decoder, ImageDecoder
from lumen_ray.decoders.common.flops import DecoderWork, convolutions, is_trainable
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.model.build import Generalist, build_decoder, images_and_targets, served_links
from lumen_ray.superlink import SuperLink
from lumen_ray.train.lora import frozen_names
from lumen_ray.train.new_tokens import only_new_rows
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.comm import BridgedVision, CommVision, Encoder, MergedEncoder
from lumen_ray.trunk.dense import ConvStem, DenseFeatures
from lumen_ray.trunk.layout import IGNORE

#: dense (no sparsity) peak rates of a GPU in FLOP/s: bf16 and fp32 without TF32; from the vendors' data sheets
PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak(device: torch.device, precision: str) -> float | None:
    """Peak rate of a device in FLOP/s; None where it is unknown, as for CPUs."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """Peak rate in FLOP/s by a GPU's CUDA name, e.g. ``NVIDIA H100 80GB HBM3``; None where it is unknown."""
    for key in sorted(PEAKS, key=len, reverse=True):  # longer keys first: "A10" is contained in "A100"
        if all(word in name for word in key.split()):
            return PEAKS[key][0 if precision == "bf16" else 1]
    return None


def of_step(model: Generalist, batches: list[TrainingBatch]) -> dict[str, float]:
    """Forward and backward FLOPs of this rank's micro-steps by component: vision, llm, dense, and the decoders that the
    steps train."""
    passes = passes_by_component(model)
    total: dict[str, float] = {}
    for batch in batches:
        trained = [name for name in model.decoders if batch.decoders is None or name in batch.decoders]
        counts = {name: count * passes[name] for name, count in forward(model, batch).items()}
        if model.trunk.kept is not None:
            counts = {}
        elif not model.trunk.dense_readers.intersection(trained):
            counts.pop("dense", None)
        counts |= {name: of_decoder(model, name, batch, passes) for name in trained}
        for name, count in counts.items():
            total[name] = total.get(name, 0.0) + count
    return total


def of_decoder(model: Generalist, name: str, batch: TrainingBatch, passes: Mapping[str, int]) -> float:
    """Forward and backward FLOPs of a decoder on a batch; 0 if the batch has no prompts for it."""
    decoder, layout = cast("Decoder | ImageDecoder", model.decoders[name]), batch.layout
    served = served_links(name, batch) if decoder.family in layout.link_branches else []
    if not served:
        return 0.0
    columns = (layout.link_images, layout.link_parents, layout.link_groups)
    images, parents, groups = (column[decoder.family].cpu() for column in columns)
    members = torch.tensor(served)
    pixels, targets = images_and_targets(decoder, batch)
    source = "dense" if decoder.reads == "dense" else "llm"
    work = DecoderWork(
        link=SuperLink(name, torch.empty(len(images), 0), images, parents, groups).select(members),
        pixels=pixels,
        targets=targets.select(members),
        num_images=len(batch.images),
        input_size=(batch.images.shape[-2], batch.images.shape[-1]),
        needs_input_grad=passes[source] > 1 or is_trainable(model.trunk.link_heads[name]),
        build=partial(build_decoder, model.settings, name),
    )
    return DECODERS[name].resolve("flops")(decoder, work)


def passes_by_component(model: Generalist) -> dict[str, int]:
    """How often the products of each trunk component are computed in a step: 1 (forward), and 1 each for the gradients
    of its inputs and of its weights, where they are needed.

    The first trainable component needs no gradient of its inputs, but its layers need those of theirs.
    """
    frozen = frozen_names(model)
    trunk = model.trunk
    passes: dict[str, int] = {}
    input_gradient = False
    through_stem = trunk.settings.tokens_read_stem and is_trainable(trunk.stem)
    for name, modules in (
        ("vision", (trunk.vision,)),
        ("llm", (trunk.llm, trunk.regions, trunk.queries)),
        ("dense", (trunk.dense, trunk.stem)),
    ):
        if modules[0] is None:
            continue
        input_gradient = input_gradient or any(is_trainable(module) for module in modules)
        # adapters pass gradients on, the frozen weights get none
        adapted = name == "llm" and (bool(frozen) or bool(only_new_rows(model)))
        weight_gradient = is_trainable(modules[0]) and not adapted
        passes[name] = 1 + input_gradient + weight_gradient
        input_gradient = input_gradient or through_stem  # tokens pass gradients on to the stem, beside the encoders
    return passes


def forward(model: Generalist, batch: TrainingBatch) -> dict[str, float]:
    """FLOPs of one forward pass of the trunk by component."""
    height, width = batch.images.shape[-2:]
    images, layout, trunk = len(batch.images), batch.layout, model.trunk
    rows, columns = trunk.vision.grid(height, width)
    supervised = int((layout.labels[:, 1:] != IGNORE).sum())
    sequences, tokens = layout.llm_shape(rows * columns * batch.most_images)
    total = {
        "vision": (images + len(batch.further_rows)) * vision(trunk.vision, height, width),
        "llm": sequences * llm(trunk.llm.config, tokens) + 2 * supervised * _vocabulary(trunk.llm.config),
    }
    if trunk.dense is None or trunk.stem is None:
        return total
    maps = stem(trunk.stem, height, width)
    if layout.query_slots:  # else nothing reads the dense features
        maps += dense(trunk.dense, height, width, trunk.vision.patch_size, (rows, columns))
    return total | {"dense": images * maps}


def _layer(tokens: float, width: int, attention: int, key_value: int, hidden: int, matrices: int) -> float:
    """FLOPs of one transformer layer on `tokens`; `attention`, `key_value`: total widths of query, and of key or value,
    heads; `matrices`: of its MLP."""
    projections = 2 * tokens * width * (2 * attention + 2 * key_value)
    return projections + 4 * tokens * tokens * attention + matrices * 2 * tokens * width * hidden


def llm(config: Any, tokens: int) -> float:
    """FLOPs of a gated decoder-only LLM (Llama, Qwen, Mistral families) on one row of `tokens`."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value = head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    attention = head * config.num_attention_heads
    one = _layer(tokens, config.hidden_size, attention, key_value, config.intermediate_size, 3)
    return config.num_hidden_layers * one


def _vocabulary(config: Any) -> float:
    return config.hidden_size * config.vocab_size


def vision(module: CommVision | BridgedVision, height: int, width: int) -> float:
    """FLOPs of the encoders, their layer merges and the projector on one image."""
    patches = (height // module.patch_size) * (width // module.patch_size)
    tokens = patches / module.token_merge**2
    total = _linear(filter(_is_linear, module.projector.modules()), tokens)
    if module.from_stem is not None:
        total += _linear([module.from_stem], tokens)
    for encoder in (module.clip, module.dinov2):
        if encoder is not None:
            total += _encoder(encoder, patches)
    if module.dinov2 is not None:
        total += _linear(filter(_is_linear, module.dinov2_mlp), patches)
    return total


def _encoder(encoder: Encoder, patches: int) -> float:
    config: Any = encoder.model.config
    width = config.hidden_size
    hidden = getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio)
    layers = config.num_hidden_layers * _layer(patches + 1, width, width, width, hidden, 2)
    merged = _linear(encoder.merge.projections, patches) if isinstance(encoder, MergedEncoder) else 0
    return 2.0 * patches * 3 * encoder.patch_size**2 * width + layers + merged


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _linear(layers: Iterable[Any], rows: float) -> float:
    """FLOPs of linear layers, with adapters or without, on `rows` vectors each."""
    return sum(2.0 * rows * layer.in_features * layer.out_features for layer in layers)


def stem(module: ConvStem, height: int, width: int) -> float:
    """FLOPs of the convolutional stem on one image."""
    total, h, w = 0.0, height, width
    for down in (module.down4, module.down8, module.down16):
        count, h, w = convolutions(down, h, w)
        total += count
    return total


def dense(module: DenseFeatures, height: int, width: int, patch: int, grid: tuple[int, int]) -> float:
    """FLOPs of the shared dense features of one image, without the stem."""
    total = 0.0
    for stride, parts in (
        (4, (module.lateral4, module.fuse4)),
        (8, (module.lateral8, module.fuse8)),
        (16, (module.lateral16, module.fuse16)),
    ):
        sides = math.ceil(height / stride), math.ceil(width / stride)
        total += convolutions(nn.ModuleList(parts), *sides)[0]
    total += convolutions(module.from_vision, height // patch, width // patch)[0]
    return total + convolutions(module.from_llm, *grid)[0]
