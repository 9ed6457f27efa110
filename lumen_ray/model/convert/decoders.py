"""Published weights of decoders: their folders, loaders, and the tokenizer of their text encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen_ray.checkpoints.hub import fetch
from lumen_ray.checkpoints.loader import PublishedLoader
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.trunk.tokenizer import vocabulary_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lumen_ray.model.settings import ModelSettings


def loaders() -> dict[str, PublishedLoader]:
    """The loaders of published weights by decoder, for decoders that have one."""
    return {name: spec.resolve("published") for name, spec in DECODERS.items() if spec.published}


def find(sources: Mapping[str, str | Path], pickle: bool) -> dict[str, Path]:
    """Resolves decoders' checkpoints to folders. Raises `UserError` for a decoder without a loader."""
    known = [name for name, spec in DECODERS.items() if spec.published]
    for name in sources:
        if name not in known:
            raise UserError(
                f"no published weights are known for decoder '{name}'; known: {', '.join(known)}", "unknown_decoder"
            )
    return {name: fetch(source, pickle) for name, source in sources.items()}


def caption_tokenizer(folders: Mapping[str, Path]) -> Tokenizer | None:
    """The tokenizer of the text encoders in decoders' folders; None if there is none. A model has one for all decoders:
    raises `UserError` if theirs differ."""
    readers = {name: loaders()[name].tokenizer for name in folders}
    read = {name: reader(folders[name]) for name, reader in readers.items() if reader is not None}
    specs = {name: json.loads(tokenizer.to_str()) for name, tokenizer in read.items()}
    for key, what in (("model", "vocabularies"), ("truncation", "lengths"), ("padding", "padding")):
        if any(spec[key] != next(iter(specs.values()))[key] for spec in specs.values()):
            raise UserError(
                f"the tokenizers of the text encoders of {' and '.join(specs)} have different {what}, but a model has "
                "only one; give decoders whose text encoders share a tokenizer",
                "wrong_tokenizer",
            )
    return next(iter(read.values()), None)


def text_encoders(settings: ModelSettings) -> dict[str, dict[str, Any]]:
    """Keys of `transformers.CLIPTextConfig` by decoder, for decoders with a text encoder."""
    encoders = {name: section.caption_encoder for name, section in settings.sections.items()}
    return {name: dict(keys) for name, keys in encoders.items() if keys is not None}


def check_captions(captions: Tokenizer | None, settings: ModelSettings, what: str) -> None:
    """Raises `UserError` if the ids of the caption tokenizer do not fit a text encoder of the model's decoders. `what`
    names the tokenizer."""
    from transformers import CLIPTextConfig

    if captions is None:
        return
    for name, keys in text_encoders(settings).items():
        encoder, length = CLIPTextConfig(**keys), (captions.truncation or {}).get("max_length")
        if length != encoder.max_position_embeddings or vocabulary_rows(captions) > encoder.vocab_size:
            raise UserError(
                f"{what} gives {length} ids below {vocabulary_rows(captions)}, but {name}.text_encoder takes "
                f"{encoder.max_position_embeddings} below {encoder.vocab_size}; set the "
                "max_position_embeddings and vocab_size that the tokenizer was published with",
                "wrong_tokenizer",
            )
