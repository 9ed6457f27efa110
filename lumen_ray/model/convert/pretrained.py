"""Assembles a model from published weights: a CLIP vision tower, a DINOv2, a causal LM and decoders, each from a
separate checkpoint. Modules without published weights (merge, projector, region encoder, queries, link heads) get fresh
ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, CLIPVisionConfig, Dinov2Config, PretrainedConfig

from lumen_ray import config
from lumen_ray.checkpoints.hub import Checkpoint, read_json
from lumen_ray.checkpoints.rules import ModuleRules, Rule, apply, check_fits
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.meta_init import published_parts_on_meta
from lumen_ray.model.build import VOCABULARY, ModelMeta, build_decoder, build_model, save_model, tied_weights
from lumen_ray.model.convert import decoders as decoder_weights
from lumen_ray.model.convert.encoder_rules import CLIP, DINOV2, LLM
from lumen_ray.model.convert.trained import load_parts
from lumen_ray.model.settings import ModelSettings
from lumen_ray.trunk.tokenizer import EOS, PAD, LumenTokenizer
from lumen_ray.trunk.turns import Message, Turns, read_template

#: supported LLMs: a stack of dense layers, with `model` and `lm_head`
LLM_TYPES = ("llama", "mistral", "qwen2", "qwen3")
#: keys of a published config.json that do not describe the layers, or that are set elsewhere
_OTHER_KEYS = frozenset(
    [
        "vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "use_cache",
        "pretraining_tp",
        "out_features",
        "out_indices",
        "stage_names",
        "apply_layernorm",
        "reshape_hidden_states",
    ]
)
#: keys written to a model's settings even if they have the class's default
_SIZES = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "image_size",
        "tie_word_embeddings",
    ]
)


@dataclass(frozen=True)
class Sources:
    """Folders or hub ids of published checkpoints. None: the preset has no such encoder. `decoders`: by decoder
    name. `vision`: a trained model with the encoders instead, see `trained.py`."""

    llm: str | Path
    clip: str | Path | None = None
    dinov2: str | Path | None = None
    decoders: Mapping[str, str | Path] = field(default_factory=dict)
    vision: str | Path | None = None


@dataclass
class Assembly:
    """An assembled model: `state` holds all tensors, `loaded` the names of those from checkpoints."""

    settings: ModelSettings
    tokenizer: LumenTokenizer
    state: dict[str, Tensor]
    loaded: set[str]

    def parameters(self) -> dict[str, tuple[int, int]]:
        """(parameters from checkpoints, fresh parameters) by module."""
        loaded: Counter[str] = Counter()
        fresh: Counter[str] = Counter()
        tied = tied_weights(self.settings)
        for name, tensor in ((name, tensor) for name, tensor in self.state.items() if name not in tied):
            (loaded if name in self.loaded else fresh)[".".join(name.split(".")[:2])] += tensor.numel()
        return {part: (loaded[part], fresh[part]) for part in sorted(loaded | fresh)}


def config_keys(config_class: type[PretrainedConfig], published: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a published config that describe the layers and differ from the class's defaults."""
    fields = {f.name for f in dataclasses.fields(config_class)} - {f.name for f in dataclasses.fields(PretrainedConfig)}
    values, defaults = config_class.from_dict(dict(published)).to_dict(), config_class().to_dict()
    keys = {k: v for k, v in values.items() if k in fields - _OTHER_KEYS and (k in _SIZES or v != defaults.get(k))}
    if set(keys.get("layer_types") or ()) <= {"full_attention"}:
        keys.pop("layer_types", None)  # one per layer, all equal
    return keys


def _expect(checkpoint: Checkpoint, kinds: tuple[str, ...], what: str) -> None:
    kind = checkpoint.config.get("model_type")
    if kind not in kinds:
        raise UserError(
            f"'{checkpoint.folder}' holds a model of type '{kind}', not {what}; its config.json must have model_type "
            f"{' or '.join(kinds)}",
            "wrong_checkpoint",
        )


def settings_from(
    preset: ModelSettings,
    checkpoints: Mapping[str, Checkpoint],
    decoders: Mapping[str, Path] = MappingProxyType({}),
    keeps_encoders: bool = False,
) -> ModelSettings:
    """The preset with the sizes of the checkpoints 'clip', 'dinov2' and 'llm', and of decoders' folders. Raises
    `UserError` if they do not fit the preset or each other. `keeps_encoders`: the encoders are the preset's own."""
    data = preset.model_dump(mode="json")
    for name, folder in decoders.items():
        if data[name] is None:
            raise UserError(f"preset '{preset.name}' has no decoder '{name}'; remove its weights", "unknown_decoder")
        data[name] |= decoder_weights.loaders()[name].sizes(folder)
    for name, kinds, config_class in (
        ("clip", ("clip", "clip_vision_model"), CLIPVisionConfig),
        ("dinov2", ("dinov2",), Dinov2Config),
    ):
        if (checkpoint := checkpoints.get(name)) is None:
            if data["vision"][name] is not None and not keeps_encoders:
                raise UserError(
                    f"preset '{preset.name}' has {name}; give its checkpoint with --{name}, a trained model that has "
                    f"it with --vision, or set vision.{name}: null",
                    "missing_checkpoint",
                )
            continue
        _expect(checkpoint, kinds, f"a {'CLIP vision tower' if name == 'clip' else 'DINOv2'}")
        published = checkpoint.config.get("vision_config") or checkpoint.config
        data["vision"][name] = config_keys(config_class, published)
    for name in preset.decoder_names:
        if DECODERS[name].published and name not in decoders:
            raise UserError(
                f"preset '{preset.name}' has {name}; give its checkpoint with --decoder {name}=DIR, or set {name}: "
                "null in a preset file of your own",
                "missing_checkpoint",
            )
    llm = checkpoints["llm"]
    _expect(llm, LLM_TYPES, "a causal LM of a known family")
    kind = llm.config["model_type"]
    data["llm"] = {"model_type": kind, **config_keys(CONFIG_MAPPING[kind], llm.config)}
    _check_patches(checkpoints, data["vision"])
    return config.validate(ModelSettings, data, f"preset '{preset.name}' with these checkpoints")


def _check_patches(checkpoints: Mapping[str, Checkpoint], vision: Mapping[str, Any]) -> None:
    sizes = {name: vision[name]["patch_size"] for name in ("clip", "dinov2") if name in checkpoints}
    if len(set(sizes.values())) > 1:
        listed = " but ".join(
            f"'{checkpoints[name].folder}' has patches of {size} pixels" for name, size in sizes.items()
        )
        raise UserError(f"{listed}; give encoders of one patch size, so that they share a grid", "wrong_patch_size")


def read_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, dict[str, Any]]:
    """A checkpoint's tokenizer, and the contents of its tokenizer_config.json (empty if it has none). Raises
    `UserError` if the tokenizer is missing or damaged."""
    path = checkpoint.folder / "tokenizer_config.json"
    tokenizer_config = read_json(path) if path.is_file() else {}
    if (path := checkpoint.folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise UserError(f"'{path}' is damaged: {str(error).splitlines()[0]}", "damaged_checkpoint") from None
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder).backend_tokenizer
        except Exception as error:  # no file of a tokenizer, or a package that reads it is missing
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"'{checkpoint.folder}' has no tokenizer.json, and none can be built from its other files: {reason}",
                "missing_tokenizer",
            ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, tokenizer_config


def _token_name(
    tokenizer: Tokenizer, checkpoint: Checkpoint, tokenizer_config: Mapping[str, Any], kind: str
) -> str | None:
    """The LLM's token for `kind` ('eos', 'pad', 'bos'); None if it has none."""
    name = tokenizer_config.get(f"{kind}_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    if name is None and f"{kind}_token" not in tokenizer_config:  # only its id may be known, from config.json
        number = checkpoint.config.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) else number
        name = None if number is None or number < 0 else tokenizer.id_to_token(number)
    return name if name is not None and tokenizer.token_to_id(name) is not None else None


def read_turns(checkpoint: Checkpoint, tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any]) -> Turns | None:
    """The turns of an LLM's chat template, None if it has none. Raises `UserError` if they are no fixed texts."""
    template = tokenizer_config.get("chat_template")
    if (path := checkpoint.folder / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name, as some older checkpoints have them
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}.get("default")
    if not isinstance(template, str):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    kinds = ("bos", "eos", "pad", "unk")
    names = {f"{kind}_token": _token_name(tokenizer, checkpoint, tokenizer_config, kind) for kind in kinds}
    given: dict[str, Any] = {name: token for name, token in names.items() if token}

    def render(messages: list[Message]) -> str:
        result: Any = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **given)
        return result[0][0]  # of (rendered texts, ...), which its annotation calls a text

    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    turns = read_template(render, special, names["eos_token"])
    return replace(turns, stops=tuple(dict.fromkeys([*turns.stops, *_eos_names(checkpoint, tokenizer)])))


def _eos_names(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[str]:
    """The tokens that end a sequence by config.json and generation_config.json."""
    found: list[str] = []
    path = checkpoint.folder / "generation_config.json"
    for settings in (checkpoint.config, read_json(path) if path.is_file() else {}):
        numbers = settings.get("eos_token_id")
        for number in numbers if isinstance(numbers, list) else [numbers]:
            name = tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None
            found += [name] if name is not None else []
    return found


def lumen_tokenizer(
    checkpoint: Checkpoint, captions: Tokenizer | None = None
) -> tuple[LumenTokenizer, int, tuple[int, ...]]:
    """An LLM's tokenizer with our special tokens, the id of the first added one, and the token ids that begin its
    sequences: with a chat template, all that it writes before the first question. `captions`: the tokenizer of the
    diffusion decoders' text encoder."""
    tokenizer, tokenizer_config = read_tokenizer(checkpoint)
    turns = read_turns(checkpoint, tokenizer, tokenizer_config)
    plain, started = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    lead = tuple(started[: started.index(plain[0])]) if plain and plain[0] in started else ()
    if not lead and tokenizer_config.get("add_bos_token"):
        bos = _token_name(tokenizer, checkpoint, tokenizer_config, "bos")
        if bos and (bos_id := tokenizer.token_to_id(bos)) is not None:
            lead = (bos_id,)
    eos, pad = (_token_name(tokenizer, checkpoint, tokenizer_config, kind) for kind in ("eos", "pad"))
    names = {EOS: eos} if eos else {}
    if pad and pad != eos:
        names[PAD] = pad
    ours, first = LumenTokenizer.extend(tokenizer, names, captions=captions, turns=turns)
    return ours, first, lead if turns is None else ours.encode(turns.begin)


def resized(weight: Tensor, known: int, rows: int) -> Tensor:
    """Resizes an embedding [old rows, width] to `rows` rows: the first `known` are kept, the others are their mean."""
    mean = weight[:known].float().mean(0).to(weight.dtype)
    return torch.cat([weight[:known], mean.expand(rows - known, -1)])


def encoder_state(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...], target: str, what: str) -> dict[str, Tensor]:
    """A published encoder's tensors below our prefix `target`; `what` names it in errors."""
    state, report = apply(tensors, [ModuleRules("", target, rules)])
    report.refuse(what)
    return state


def llm_state(tensors: Mapping[str, Tensor], known: int, rows: int, tied: bool, what: str) -> dict[str, Tensor]:
    """A published LLM's tensors by our names, for a vocabulary of `rows` tokens, the first `known` of them its own."""
    state = encoder_state(tensors, LLM, "trunk.llm.", what)
    inner, outer = VOCABULARY
    if tied and inner in state:
        state.setdefault(outer, state[inner])
    for name in VOCABULARY:
        if name in state:
            if len(state[name]) < known:
                raise UserError(
                    f"{what}: its tokenizer has {known} tokens but its embedding {len(state[name])} rows; give the "
                    "tokenizer that belongs to it",
                    "wrong_tokenizer",
                )
            state[name] = resized(state[name], known, rows)
    return state


#: What scales the image tokens: they start as large as the LLM's words are, in which published LLMs differ.
TOKEN_SCALE = "trunk.vision.token_norm.weight"


def blank(settings: ModelSettings, rows: int, seed: int) -> dict[str, Tensor]:
    """The state of a model with fresh weights for modules that are not published; the others are on the meta device."""
    with published_parts_on_meta():
        return build_model(settings, rows, seed).state_dict()


def fill(
    fresh: dict[str, Tensor], loaded: dict[str, Tensor], what: str, may_be_fresh: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """`fresh`, a `blank` model's state, updated with the loaded tensors. Raises `UserError` if they do not fit, or if a
    tensor is missing that is on the meta device; with `may_be_fresh` if its name has none of those prefixes."""

    def needed(name: str, tensor: Tensor) -> bool:
        return tensor.is_meta if may_be_fresh is None else not name.startswith(may_be_fresh)

    check_fits(loaded, {n: t for n, t in fresh.items() if n in loaded or needed(n, t)}, what)
    return fresh | loaded


def assemble(
    preset: ModelSettings, sources: Sources, output: str | Path, pickle: bool = False, seed: int = 0
) -> Assembly:
    """Builds the preset's model from published checkpoints and writes its model folder to `output`.

    Sizes of the encoders and the LLM are those of the checkpoints. `pickle`: also read pickled weights. `seed`: of the
    fresh weights. Raises `UserError` for an unsuitable checkpoint.
    """
    towers = {"clip": sources.clip, "dinov2": sources.dinov2, "llm": sources.llm}
    if sources.vision is not None and (sources.clip is not None or sources.dinov2 is not None):
        raise UserError("--vision brings CLIP and DINOv2; leave out --clip and --dinov2", "usage")
    loaded = {} if sources.vision is None else load_parts(preset, sources.vision)
    checkpoints = {name: Checkpoint(source, pickle) for name, source in towers.items() if source is not None}
    folders = decoder_weights.find(sources.decoders, pickle)
    settings = settings_from(preset, checkpoints, folders, keeps_encoders=sources.vision is not None)
    captions = decoder_weights.caption_tokenizer(folders)
    decoder_weights.check_captions(captions, settings, "the tokenizer of the decoders' text encoder")
    tokenizer, known, lead = lumen_tokenizer(checkpoints["llm"], captions)
    settings = settings.model_copy(update={"published_tokens": known})
    if settings.prefix_attention == "causal" or tokenizer.turns is not None:
        settings = settings.model_copy(update={"lead_tokens": lead})
    for name, rules in (("clip", CLIP), ("dinov2", DINOV2)):
        if name in checkpoints:
            what = f"'{checkpoints[name].folder}'"
            loaded |= encoder_state(checkpoints[name], rules, f"trunk.vision.{name}.model.", what)
    llm = checkpoints["llm"]
    tied = bool(settings.llm.get("tie_word_embeddings"))
    loaded |= llm_state(llm, known, len(tokenizer), tied, f"'{llm.folder}'")
    for name, folder in folders.items():
        state = decoder_weights.loaders()[name].load(folder, partial(build_decoder, settings, name), pickle)
        loaded |= {f"decoders.{name}.{key}": tensor for key, tensor in state.items()}
    fresh = blank(settings, len(tokenizer), seed)
    if (scale := fresh.get(TOKEN_SCALE)) is not None and TOKEN_SCALE not in loaded:
        words = loaded[VOCABULARY[0]][:known].float()
        fresh[TOKEN_SCALE] = torch.full_like(scale, float(words.square().mean().sqrt()))
    state = fill(fresh, loaded, "the checkpoints")
    save_model(output, state, settings, tokenizer, ModelMeta(settings.name, seed=seed))
    return Assembly(settings, tokenizer, state, set(loaded))
