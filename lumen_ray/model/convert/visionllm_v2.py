"""A released VisionLLM v2 checkpoint -> a model folder, with a record of where every tensor went."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lumen_ray import config
from lumen_ray.checkpoints.hub import Checkpoint
from lumen_ray.checkpoints.rules import Entry, Part, ReleasedModule, Report, Rule, apply, find_rule
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, save_model
from lumen_ray.model.convert import trunk_rules as trunk
from lumen_ray.model.convert.lora import Merged
from lumen_ray.model.convert.pretrained import Assembly, blank, fill, read_tokenizer
from lumen_ray.model.settings import ModelSettings
from lumen_ray.trunk.sequential import lead_tokens
from lumen_ray.trunk.tokenizer import EOS, PAD, LumenTokenizer

#: what the checkpoint's tokenizer calls our special tokens
NAMES = {PAD: "[PAD]", EOS: "</s>"}
START = "<s>"
#: values of its config.json that this layout stands for
CONFIG = {"vl_bridge_type": "mlp2x_gelu", "vis_output_layer": -2, "use_pixelshuffle": False, "num_embs": 4}
#: parts of the trunk that only decoders of dense features read, which the reference does not have
DENSE = ("trunk.stem.", "trunk.dense.")
#: of the adapters that the reference trains on the LLM
LORA_ALPHA = 64.0
REPORT_FILE = "conversion.json"


def released_modules() -> dict[str, ReleasedModule]:
    """Decoder -> its module in the checkpoint, of decoders that have one."""
    return {name: spec.resolve("released") for name, spec in DECODERS.items() if spec.released}


def parts(model: Collection[str]) -> tuple[Part, ...]:
    """Where a checkpoint's tensors go in a model of tensors with these names; what is for decoders that it does not
    have is dropped."""
    queries = "trunk.queries.queries."
    decoders = {name.split(".")[1] for name in model if name.startswith("decoders.")}
    found = list(trunk.parts({name.removeprefix(queries) for name in model if name.startswith(queries)}))
    for decoder, released in released_modules().items():
        source = f"{released.module}."
        if decoder in decoders:
            found += released.parts(f"decoders.{decoder}.", f"trunk.link_heads.{decoder}.", source)
        else:
            found.append(Part(source, "", [Rule(r".+", drop=f"the preset has no decoder '{decoder}'")]))
    return tuple(found)


def may_be_fresh(model: Collection[str]) -> tuple[str, ...]:
    """Prefixes of the names of a model's tensors that the released one does not have."""
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
    """{our name: tensor} of a whole checkpoint for a model of tensors with these names, and where each of its tensors
    went. Adapters are merged."""
    merged, table = Merged(tensors, lora_alpha), parts(model)
    state, report = apply(merged, table)
    for adapter, weight in merged.merged.items():
        found = find_rule(weight, table)
        to = found[1] if found else ()
        report.entries.append(Entry(adapter, tuple(tensors[adapter].shape), "merged", to, f"added to {weight}"))
    return state, report


def _tokenizer(source: Checkpoint) -> LumenTokenizer:
    backend, _ = read_tokenizer(source)
    try:
        return LumenTokenizer(backend, NAMES)
    except UserError as error:
        raise UserError(f"'{source.folder}' is no VisionLLM v2 checkpoint: {error}", "wrong_checkpoint") from None


def convert(
    checkpoint: str | Path,
    preset: ModelSettings,
    output: str | Path,
    pickle: bool = False,
    lora_alpha: float = LORA_ALPHA,
    seed: int = 0,
) -> tuple[Assembly, Report]:
    """Converts a released VisionLLM v2 checkpoint of the preset's size and writes a model folder to `output`.

    `lora_alpha`: of adapters that were not merged. What the reference does not have, such as the light decoder, gets
    fresh weights. It brings no tokenizer of its text encoders, so in further training links are not aligned with
    captions. `UserError` where a tensor is left over, missing or of another size.
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
    told = {"checkpoint": str(source.folder), "counts": report.counts(), "fresh": fresh, "tensors": entries}
    (output / REPORT_FILE).write_text(json.dumps(told, indent=1))
