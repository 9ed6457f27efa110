"""Published weights of the expert decoders, by our names: one loader for each kind of checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen_ray.checkpoints.hub import Checkpoint, fetch, read_json
from lumen_ray.checkpoints.rules import apply, check_fits
from lumen_ray.errors import UserError
from lumen_ray.tasks import decoder_class
from lumen_ray.trunk.tokenizer import vocabulary_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lumen_ray.model.settings import ModelSettings


@dataclass(frozen=True)
class Loader:
    """`sizes`: (folder) -> keys of the decoder's settings that the checkpoint determines. `load`: (folder, settings of
    the model, whether pickle is allowed) -> {name below `decoders.<decoder>.`: tensor}. `fresh`: prefixes of such names
    that the checkpoint has nothing for. `tokenizer`: (folder) -> that of the checkpoint's text encoder."""

    sizes: Callable[[Path], dict[str, Any]]
    load: Callable[[Path, ModelSettings, bool], dict[str, Tensor]]
    fresh: tuple[str, ...] = ()
    tokenizer: Callable[[Path], Tokenizer] | None = None


#: of Grounding DINO: masks, the norm of the map that only they read, what projects links, and a scale of their scores
GROUNDING_DINO_FRESH = (
    "link_proj.",
    "mask_head.",
    "mask_embed.",
    "trunk.backbone.hidden_states_norms.stage1.",
    "class_",
)


def grounding_dino_state(tensors: Mapping[str, Tensor], settings: ModelSettings, what: str) -> dict[str, Tensor]:
    """What `GroundingDinoForObjectDetection.save_pretrained` writes, by our names. Only `GROUNDING_DINO_FRESH`
    may be missing."""
    from lumen_ray.decoders.grounding_dino.released import published_parts

    state, report = apply(tensors, published_parts())
    report.refuse(what)
    with torch.device("meta"):
        whole = decoder_class("grounding_dino").build(settings).state_dict()
    check_fits(state, {n: t for n, t in whole.items() if n in state or not n.startswith(GROUNDING_DINO_FRESH)}, what)
    return state


def _grounding_dino(folder: Path, settings: ModelSettings, pickle: bool) -> dict[str, Tensor]:
    return grounding_dino_state(Checkpoint(folder, pickle), settings, f"'{folder}'")


def _grounding_dino_sizes(folder: Path) -> dict[str, Any]:
    """Those of its config.json; the preset's for what masks and losses need."""
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


def _diffusion(name: str) -> Loader:
    def sizes(folder: Path) -> dict[str, Any]:
        from lumen_ray.decoders.diffusion.published import published_settings

        return published_settings(folder)

    def load(folder: Path, settings: ModelSettings, pickle: bool) -> dict[str, Tensor]:
        from lumen_ray.decoders.diffusion.published import load_published

        decoder = decoder_class(name).build(settings)
        load_published(decoder, folder, pickle)
        return decoder.state_dict()

    def tokenizer(folder: Path) -> Tokenizer:
        from lumen_ray.decoders.diffusion.published import published_tokenizer

        return published_tokenizer(folder)

    return Loader(sizes, load, tokenizer=tokenizer)


LOADERS: dict[str, Loader] = {
    "grounding_dino": Loader(_grounding_dino_sizes, _grounding_dino, GROUNDING_DINO_FRESH),
    "stable_diffusion": _diffusion("stable_diffusion"),
    "instruct_pix2pix": _diffusion("instruct_pix2pix"),
}


def find(sources: Mapping[str, str | Path], pickle: bool) -> dict[str, Path]:
    """The folders of decoders' checkpoints; `UserError` for a decoder that none are known for."""
    for name in sources:
        if name not in LOADERS:
            raise UserError(
                f"no published weights are known for decoder '{name}'; known: {', '.join(LOADERS)}", "unknown_decoder"
            )
    return {name: fetch(source, pickle) for name, source in sources.items()}


def caption_tokenizer(folders: Mapping[str, Path]) -> Tokenizer | None:
    """The tokenizer of the text encoders in decoders' folders; None where no decoder has one. A model keeps one for all
    its decoders: `UserError` where theirs give other ids."""
    readers = {name: LOADERS[name].tokenizer for name in folders}
    read = {name: reader(folders[name]) for name, reader in readers.items() if reader is not None}
    told = {name: json.loads(tokenizer.to_str()) for name, tokenizer in read.items()}
    for key, what in (("model", "vocabularies"), ("truncation", "lengths"), ("padding", "padding")):
        if any(one[key] != next(iter(told.values()))[key] for one in told.values()):
            raise UserError(
                f"the tokenizers of the text encoders of {' and '.join(told)} have different {what}, and a model keeps "
                "one of them; give decoders whose text encoders were published with the same",
                "wrong_tokenizer",
            )
    return next(iter(read.values()), None)


def text_encoders(settings: ModelSettings) -> dict[str, dict[str, Any]]:
    """Keys of `transformers.CLIPTextConfig` by decoder, of those that have a text encoder."""
    found = {name: getattr(getattr(settings, name), "text_encoder", None) for name in settings.decoder_names}
    return {name: keys for name, keys in found.items() if keys is not None}


def check_captions(captions: Tokenizer | None, settings: ModelSettings, what: str) -> None:
    """`UserError` where a text encoder of the model's decoders cannot take what the tokenizer for them gives. `what`
    names the tokenizer."""
    from transformers import CLIPTextConfig

    if captions is None:
        return
    for name, keys in text_encoders(settings).items():
        encoder, length = CLIPTextConfig(**keys), (captions.truncation or {}).get("max_length")
        if length != encoder.max_position_embeddings or vocabulary_rows(captions) > encoder.vocab_size:
            raise UserError(
                f"{what} gives {length} ids below {vocabulary_rows(captions)}, but {name}.text_encoder takes "
                f"{encoder.max_position_embeddings} below {encoder.vocab_size}; give it the "
                "max_position_embeddings and vocab_size that the tokenizer was published with",
                "wrong_tokenizer",
            )
