"""A trained model as the start of another: its trunk, its decoders, and fresh weights for decoders it does not have.

Settings by which weights are read are those they were trained with, so both must agree on them. What the folder's
decoders have that the new model lacks is left out.
"""

from __future__ import annotations

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

#: settings that two models with one trunk may differ in. A folder's lead tokens go with its tokenizer.
_FREE = {"name", "published_weights", "vocab_size", "lead_tokens", "decoders", *DECODERS}


def start_settings(settings: ModelSettings, folder: str | Path) -> ModelSettings:
    """Settings of a model that starts from the one in `folder`: its lead tokens, all else as asked. `UserError` where
    the trunks differ, or a decoder of both would read its weights in another way than they were trained in."""
    read_meta(folder)
    source = read_settings(folder)
    shared = [name for name in settings.decoder_names if name in source.decoder_names]
    ours, theirs = (_read_by(s, shared) for s in (settings, source))
    if different := list(_differences(ours, theirs)):
        raise UserError(
            f"'{folder}' cannot be where preset '{settings.name}' starts, it has {', '.join(different[:3])}; give a "
            "model with these settings of the preset, or name the folder's config.yaml as the recipe's model",
            "wrong_start",
        )
    return settings.model_copy(update={"lead_tokens": source.lead_tokens})


def _read_by(settings: ModelSettings, decoders: Iterable[str]) -> dict[str, Any]:
    """What weights of the trunk and of `decoders` are read by, but for their shapes; of a published part with all keys
    of the library's config, as presets leave out other defaults of it than converted checkpoints."""
    found = settings.model_dump(mode="json", exclude=_FREE)
    encoders = settings.vision.configs(settings.image_size)
    found["vision"] |= {name: encoder.to_dict() for name, encoder in encoders.items()}
    found["llm"] = settings.llm_config().to_dict()
    for name in decoders:
        found[name] = settings.sections[name].weight_semantics()
    return found


def _differences(ours: object, theirs: object, where: str = "") -> Iterator[str]:
    """'llm.hidden_size 96 instead of 128', key by key."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
    elif ours != theirs:
        yield f"{where} {theirs} instead of {ours}"


def start_tokenizer(settings: ModelSettings, folder: str | Path) -> LumenTokenizer:
    """The tokenizer in `folder`, with the routing tokens of the model's decoders that it lacks behind its own.
    `UserError` where the one kept beside it does not fit the text encoder of such a decoder."""
    tokenizer = read_tokenizer(folder)
    check_captions(tokenizer.captions, settings, f"{CAPTIONS_FILE} in '{folder}'")
    return LumenTokenizer.extend(tokenizer.backend, tokenizer.names, settings.families, tokenizer.captions)[0]


class StartWeights(Mapping[str, Tensor]):
    """What the folder of a model gives one with its `start_settings` and `start_tokenizer`, read when it is asked for.

    New rows of the vocabulary are the mean of the old ones. Decoders that the folder lacks are left out.
    """

    def __init__(self, model: Generalist, folder: str | Path):
        """`model` may be without weights. `UserError` where a tensor does not fit."""
        self._file, source = open_weights(folder), read_settings(folder)
        dropped, added = (_parts_of_one_alone(*pair) for pair in ((source, model.settings), (model.settings, source)))
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


def _parts_of_one_alone(one: ModelSettings, other: ModelSettings) -> tuple[str, ...]:
    """How names of tensors begin that belong to decoders and link families which only the first model has, and to what
    the trunk has for such decoders alone."""
    decoders = [name for name in one.decoder_names if name not in other.decoder_names]
    families = [name for name in one.families if name not in other.families]
    parts = [f"{part}.{name}." for name in decoders for part in ("decoders", "trunk.link_heads")]
    if one.reads_dense and not other.reads_dense:
        parts += ["trunk.dense."] if one.tokens_read_stem else ["trunk.dense.", "trunk.stem."]
    return (*parts, *(f"trunk.queries.queries.{name}" for name in families))
