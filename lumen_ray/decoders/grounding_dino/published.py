"""Reads Grounding DINO checkpoints in the format of `transformers`."""

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

#: weights that the checkpoints lack: link projection, mask head and the norm of its stride-4 map, scale of class logits
FRESH = (
    "link_proj.",
    "mask_head.",
    "mask_embed.",
    "trunk.backbone.hidden_states_norms.stage1.",
    "class_",
)


def state_of(tensors: Mapping[str, Tensor], build: Callable[[], nn.Module], what: str) -> dict[str, Tensor]:
    """The tensors of `GroundingDinoForObjectDetection.save_pretrained` by our names. Only names that start with `FRESH`
    may be missing. Raises `UserError` for tensors that do not fit; `what` names the checkpoint."""
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
    """The settings that its config.json determines; those of masks and losses come from the preset."""
    from transformers import GroundingDinoConfig

    config = Checkpoint.read_config(folder)
    if config.get("model_type") != "grounding-dino":
        raise UserError(
            f"'{folder}' holds a model of type '{config.get('model_type')}', not grounding-dino", "wrong_checkpoint"
        )
    published = GroundingDinoConfig.from_dict(config)
    swin = {
        name: getattr(published.backbone_config, name) for name in ("embed_dim", "depths", "num_heads", "window_size")
    }
    return {
        "backbone": {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in swin.items()},
        "hidden_size": published.d_model,
        "num_heads": published.encoder_attention_heads,
        "encoder_layers": published.encoder_layers,
        "decoder_layers": published.decoder_layers,
        "encoder_ffn": published.encoder_ffn_dim,
        "decoder_ffn": published.decoder_ffn_dim,
        "encoder_points": published.encoder_n_points,
        "decoder_points": published.decoder_n_points,
        "num_queries": published.num_queries,
        **_input_size(folder),
    }


def _input_size(folder: Path) -> dict[str, Any]:
    """The setting `input_size` from its preprocessor_config.json; empty if that has none."""
    path = folder / "preprocessor_config.json"
    size = read_json(path).get("size") if path.is_file() else None
    edges = [size.get(name) for name in ("shortest_edge", "longest_edge")] if isinstance(size, dict) else [None]
    return {"input_size": edges} if None not in edges else {}


LOADER = PublishedLoader(sizes, load, FRESH)
