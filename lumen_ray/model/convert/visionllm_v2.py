"""Converts a released VisionLLM v2 checkpoint to a model folder, with a report on every tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lumen_ray import config
from lumen_ray.checkpoints.hub import Checkpoint
from lumen_ray.checkpoints.rules import ModuleRules, ReleasedModule, Report, Rule, TensorOutcome, apply, find_rule
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, save_model
from lumen_ray.model.convert import trunk_rules as trunk
from lumen_ray.model.convert.lora import Merged
from lumen_ray.model.convert.pretrained import Assembly, blank, fill, read_tokenizer
from lumen_ray.model.settings import ModelSettings
from lumen_ray.trunk.sequential import lead_tokens
from lumen_ray.trunk.tokenizer import EOS, PAD, LumenTokenizer

#: names of our special tokens in the checkpoint's tokenizer
NAMES = {PAD: "[PAD]", EOS: "</s>"}
START = "<s>"
#: values of its config.json that this conversion requires
CONFIG = {"vl_bridge_type": "mlp2x_gelu", "vis_output_layer": -2, "use_pixelshuffle": False, "num_embs": 4}
#: modules of the trunk for decoders of dense features, which the reference does not have
DENSE = ("trunk.stem.", "trunk.dense.")
#: alpha of the adapters that the reference trains on the LLM
LORA_ALPHA = 64.0
REPORT_FILE = "conversion.json"


def released_modules() -> dict[str, ReleasedModule]:
    """The checkpoint's module by decoder, for decoders that have one."""
    return {name: spec.resolve("released") for name, spec in DECODERS.items() if spec.released}


def module_rules(model: Collection[str]) -> tuple[ModuleRules, ...]:
    """The rules for a checkpoint, for a model with tensors of these names; modules of decoders that the model lacks are
    dropped."""
    queries = "trunk.queries.queries."
    decoders = {name.split(".")[1] for name in model if name.startswith("decoders.")}
    table = list(trunk.module_rules({name.removeprefix(queries) for name in model if name.startswith(queries)}))
    for decoder, released in released_modules().items():
        source = f"{released.module}."
        if decoder in decoders:
            table += released.parts(f"decoders.{decoder}.", f"trunk.link_heads.{decoder}.", source)
        else:
            table.append(ModuleRules(source, "", [Rule(r".+", drop=f"the preset has no decoder '{decoder}'")]))
    return tuple(table)


def may_be_fresh(model: Collection[str]) -> tuple[str, ...]:
    """Prefixes of a model's tensors that the released checkpoint lacks."""
    released, fresh = released_modules(), list(DENSE)
    for decoder in dict.fromkeys(name.split(".")[1] for name in model if name.startswith("decoders.")):
        if decoder in released:
            fresh += [f"decoders.{decoder}.{prefix}" for prefix in released[decoder].fresh]
        else:
            fresh += [f"trunk.link_heads.{decoder}.", f"decoders.{decoder}."]
    return tuple(fresh)


def convert_tensors(
    tensors: Mapping[str, Tensor], model: Collection[str], lora_alpha: float = LORA_ALPHA
) -> tuple[dict[str, Tensor], Report]:
    """Converts a whole checkpoint for a model with tensors of these names, merging adapters. Returns {our name: tensor}
    and the report."""
    merged, table = Merged(tensors, lora_alpha), module_rules(model)
    state, report = apply(merged, table)
    for adapter, weight in merged.merged.items():
        match = find_rule(weight, table)
        to = match[1] if match else ()
        report.entries.append(TensorOutcome(adapter, tuple(tensors[adapter].shape), "merged", to, f"added to {weight}"))
    return state, report


def _tokenizer(source: Checkpoint) -> LumenTokenizer:
    backend, _ = read_tokenizer(source)
    try:
        return LumenTokenizer(backend, NAMES)
    except UserError as error:
        raise UserError(f"'{source.folder}' is not a VisionLLM v2 checkpoint: {error}", "wrong_checkpoint") from None


def convert(
    checkpoint: str | Path,
    preset: ModelSettings,
    output: str | Path,
    pickle: bool = False,
    lora_alpha: float = LORA_ALPHA,
    seed: int = 0,
) -> tuple[Assembly, Report]:
    """Converts a released VisionLLM v2 checkpoint of the preset's size and writes a model folder to `output`.

    `lora_alpha`: of adapters that were not merged. Modules that the reference lacks, such as the light decoder, get
    fresh weights. The checkpoint has no tokenizer for its text encoders, so further training does not align links with
    captions. Raises `UserError` if a tensor is unknown, missing or of another size.
    """
    source = Checkpoint(checkpoint, pickle)
    for key, value in CONFIG.items():
        if source.config.get(key, value) != value:
            raise UserError(
                f"'{source.folder}': {key} is {source.config[key]!r}; only checkpoints with {value!r} can be converted",
                "unknown_layout",
            )
    tokenizer = _tokenizer(source)
    lead = {"lead_tokens": lead_tokens(tokenizer, START)}
    settings = config.validate(ModelSettings, preset.model_dump(mode="json") | lead, f"preset '{preset.name}'")
    fresh = blank(settings, len(tokenizer), seed)
    loaded, report = convert_tensors(source, fresh, lora_alpha)
    report.refuse(f"'{source.folder}'")
    state = fill(fresh, loaded, f"'{source.folder}'", may_be_fresh(fresh))
    save_model(output, state, settings, tokenizer, ModelMeta(settings.name, seed=seed))
    _write_report(Path(output), source, report, sorted(set(state) - set(loaded)))
    return Assembly(settings, tokenizer, state, set(loaded)), report


def _write_report(output: Path, source: Checkpoint, report: Report, fresh: list[str]) -> None:
    entries = [asdict(entry) for entry in report.entries]
    data = {"checkpoint": str(source.folder), "counts": report.counts(), "fresh": fresh, "tensors": entries}
    (output / REPORT_FILE).write_text(json.dumps(data, indent=1))
