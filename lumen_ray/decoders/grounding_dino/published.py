"""Grounding DINO as `transformers` publishes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumen_ray.checkpoints.hub import Checkpoint, read_json
from lumen_ray.checkpoints.loader import PublishedLoader
from lumen_ray.checkpoints.rules import apply, check_fits
from lumen_ray.decoders.grounding_dino.released import published_parts
from lumen_ray.errors import UserError

#: of Grounding DINO: masks, the norm of the map that only they read, what projects links, and a scale of their scores
FRESH = (
    "link_proj.",
    "mask_head.",
    "mask_embed.",
    "trunk.backbone.hidden_states_norms.stage1.",
    "class_",
)


def state_of(tensors: Mapping[str, Tensor], build: Callable[[], nn.Module], what: str) -> dict[str, Tensor]:
    """What `GroundingDinoForObjectDetection.save_pretrained` writes, by our names. Only names that start with `FRESH`
    may be missing. Raises `UserError`, which names the checkpoint as `what`, for tensors that do not fit."""
    state, report = apply(tensors, published_parts())
    report.refuse(what)
    with torch.device("meta"):
        whole = build().state_dict()
    check_fits(state, {n: t for n, t in whole.items() if n in state or not n.startswith(FRESH)}, what)
    return state


def load(folder: Path, build: Callable[[], nn.Module], pickle: bool) -> dict[str, Tensor]:
    """The weights in a folder, by the names of the decoder that `build` makes."""
    return state_of(Checkpoint(folder, pickle), build, f"'{folder}'")


def sizes(folder: Path) -> dict[str, Any]:
    """Settings that its config.json determines; those of masks and losses stay the preset's."""
    from transformers import GroundingDinoConfig

    config = Checkpoint.read_config(folder)
    if config.get("model_type") != "grounding-dino":
        raise UserError(
            f"'{folder}' holds a model of type '{config.get('model_type')}', not grounding-dino", "wrong_checkpoint"
        )
    told = GroundingDinoConfig.from_dict(config)
    swin = {name: getattr(told.backbone_config, name) for name in ("embed_dim", "depths", "num_heads", "window_size")}
    return {
        "backbone": {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in swin.items()},
        "hidden_size": told.d_model,
        "num_heads": told.encoder_attention_heads,
        "encoder_layers": told.encoder_layers,
        "decoder_layers": told.decoder_layers,
        "encoder_ffn": told.encoder_ffn_dim,
        "decoder_ffn": told.decoder_ffn_dim,
        "encoder_points": told.encoder_n_points,
        "decoder_points": told.decoder_n_points,
        "num_queries": told.num_queries,
        **_input_size(folder),
    }


def _input_size(folder: Path) -> dict[str, Any]:
    """What its preprocessor_config.json says of the images' size, where it has one."""
    path = folder / "preprocessor_config.json"
    size = read_json(path).get("size") if path.is_file() else None
    edges = [size.get(name) for name in ("shortest_edge", "longest_edge")] if isinstance(size, dict) else [None]
    return {"input_size": edges} if None not in edges else {}


LOADER = PublishedLoader(sizes, load, FRESH)
