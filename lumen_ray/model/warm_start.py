"""Initialises a model from a trained one: trunk and shared decoders are copied, other decoders get fresh weights.

Settings that change the meaning of weights must be equal in both models. Decoders that the new model lacks are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lumen_ray.checkpoints.rules import check_fits
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import Generalist, open_weights, read_meta, read_tokenizer
from lumen_ray.model.convert.decoders import check_captions
from lumen_ray.model.convert.pretrained import VOCABULARY, resized
from lumen_ray.model.settings import ModelSettings, read_settings
from lumen_ray.trunk.tokenizer import CAPTIONS_FILE, LumenTokenizer

#: settings in which models with the same trunk may differ; lead and published tokens are those of the folder, as its
#: tokenizer is
_FREE = {"name", "published_weights", "vocab_size", "lead_tokens", "published_tokens", "decoders", *DECODERS}

LINK_HEADS = "trunk.link_heads."


def start_settings(settings: ModelSettings, folder: str | Path) -> ModelSettings:
    """`settings` with the lead and published tokens of the model in `folder`, and the numbers of its published LLM, to
    start from it. Raises `UserError` if the trunks differ, or if a setting of a shared decoder would change the meaning
    of its weights."""
    read_meta(folder)
    source = read_settings(folder)
    shared = [name for name in settings.decoder_names if name in source.decoder_names]
    ours, theirs = (_weight_semantics(s, shared) for s in (settings, source))
    if different := list(_differences(ours, theirs)):
        raise UserError(
            f"preset '{settings.name}' cannot start from '{folder}', which has {', '.join(different[:3])}; give a "
            "model with the preset's settings, or name the folder's config.yaml as the recipe's model",
            "wrong_start",
        )
    # a published LLM's numbers as its file has them, which may be rounded
    kept = ("lead_tokens", "published_tokens", *(("llm",) if source.published_tokens else ()))
    return settings.model_copy(update={name: getattr(source, name) for name in kept})


def _weight_semantics(settings: ModelSettings, decoders: Iterable[str]) -> dict[str, Any]:
    """The settings that define the meaning of the weights of the trunk and of `decoders`. Library configs are complete,
    since presets and converted checkpoints omit different defaults."""
    keys = settings.model_dump(mode="json", exclude=_FREE)
    encoders = settings.vision.configs(settings.image_size)
    keys["vision"] |= {name: encoder.to_dict() for name, encoder in encoders.items()}
    keys["llm"] = settings.llm_config().to_dict()
    for name in decoders:
        keys[name] = settings.sections[name].weight_semantics()
    return keys


def _differences(ours: object, theirs: object, where: str = "") -> Iterator[str]:
    """Yields differences such as 'llm.hidden_size 96 instead of 128', key by key. Numbers that are equal in float32, in
    which some files hold them, are."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-7):
        return
    elif ours != theirs:
        yield f"{where} {theirs} instead of {ours}"


def start_tokenizer(settings: ModelSettings, folder: str | Path) -> LumenTokenizer:
    """The tokenizer in `folder`, extended by missing routing tokens of the model's decoders. Raises `UserError` if its
    caption tokenizer does not fit the text encoder of a decoder."""
    tokenizer = read_tokenizer(folder)
    check_captions(tokenizer.captions, settings, f"{CAPTIONS_FILE} in '{folder}'")
    return LumenTokenizer.extend(
        tokenizer.backend, tokenizer.names, settings.families, tokenizer.captions, tokenizer.turns
    )[0]


class StartWeights(Mapping[str, Tensor]):
    """The weights of a model folder for a model with its `start_settings` and `start_tokenizer`, read lazily.

    New rows of the vocabulary are the mean of the existing ones. Decoders that the folder lacks are absent.
    """

    def __init__(self, model: Generalist, folder: str | Path):
        """`model` may be on the meta device. Raises `UserError` if a tensor does not fit."""
        self._file, source = open_weights(folder), read_settings(folder)
        dropped, added = (_only_in_first(*pair) for pair in ((source, model.settings), (model.settings, source)))
        kept = {name: t for name, t in self._file.shapes().items() if not name.startswith(dropped)}
        expected = model.state_dict()
        self._rows = {
            name: len(t) for name, t in expected.items() if name in VOCABULARY or name.endswith(".vocabulary.weight")
        }
        for name in self._rows.keys() & kept.keys():
            kept[name] = self._with_new_rows(name, kept[name])
        needed = {name: t for name, t in expected.items() if name in kept or not name.startswith(added)}
        check_fits(kept, needed, f"'{folder}'")
        self._names = kept.keys()

    def _with_new_rows(self, name: str, weight: Tensor) -> Tensor:
        return resized(weight, len(weight), self._rows[name])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._with_new_rows(name, self._file[name]) if name in self._rows else self._file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _only_in_first(first: ModelSettings, second: ModelSettings) -> tuple[str, ...]:
    """Prefixes of tensors that only the first model has: those of decoders and link families that the second lacks, and
    of trunk modules that only such decoders need."""
    decoders = [name for name in first.decoder_names if name not in second.decoder_names]
    families = [name for name in first.families if name not in second.families]
    prefixes = [f"{module}.{name}." for name in decoders for module in ("decoders", "trunk.link_heads")]
    if first.reads_dense and not second.reads_dense:
        prefixes += ["trunk.dense."] if first.tokens_read_stem else ["trunk.dense.", "trunk.stem."]
    return (*prefixes, *(f"trunk.queries.queries.{name}" for name in families))


def taught_heads(fresh: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, str]:
    """{fresh: stored} names of the tensors of new link heads that have the names and shapes of those of a trained
    decoder of the family: its links tell classes apart, which takes a fresh head thousands of steps to learn."""
    taught: dict[str, str] = {}
    heads = [(name, *_in_link_head(name)) for name in stored if name.startswith(LINK_HEADS)]
    for name in fresh:
        if not name.startswith(LINK_HEADS):
            continue
        decoder, place = _in_link_head(name)
        for other, owner, tail in heads:
            alike = f".{place}".endswith(f".{tail}") and DECODERS[owner].family == DECODERS[decoder].family
            if alike and stored[other].shape == fresh[name].shape:
                taught.setdefault(name, other)
    return taught


def _in_link_head(name: str) -> tuple[str, str]:
    """(decoder, name in its link head) of a tensor of a link head."""
    decoder, _, place = name.removeprefix(LINK_HEADS).partition(".")
    return decoder, place
