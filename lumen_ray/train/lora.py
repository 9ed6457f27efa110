"""LoRA (arXiv 2106.09685) by `peft`: adapters beside frozen weights, merged back when a model folder is written.

`peft` replaces linear layers inside the model, so that FSDP, checkpoints and the trainer need not know of it:
`x.weight` becomes `x.base_layer.weight`, with `x.lora_A.default.weight` and `x.lora_B.default.weight` beside it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lumen_ray.checkpoints.safetensors_file import write_weights
from lumen_ray.errors import UserError
from lumen_ray.model.build import Generalist

if TYPE_CHECKING:
    from lumen_ray.recipe import LoraSettings

ADAPTER = "default"


def inject(model: Generalist, settings: LoraSettings, seed: int) -> None:
    """Puts adapters on the linear layers whose names match `targets`; `frozen_names` lists what then stays frozen.

    The model's outputs do not change: fresh adapters add zero. In a model on the meta device the adapters are on the
    CPU and have values. Raises `UserError` if a pattern matches nothing, or if the model has adapters of its own.
    """
    if model.settings.image_adapters:
        raise UserError(
            f"model '{model.settings.name}' has image_adapters, which learn in place of its LLM; leave lora out",
            "invalid_config",
        )
    peft = _peft()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted({name for pattern in settings.targets for name in _matching(pattern, list(linear), "targets")})
    modules = [name for name, _ in model.named_modules() if name]
    kept = {name for pattern in settings.also_train for name in _matching(pattern, modules, "also_train")}
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    frozen = _adapted(model, targets, kept)
    with torch.random.fork_rng(devices=[]), _stand_ins([linear[name] for name in targets]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    by_id = {id(p): name for name, p in model.named_parameters()}
    names = frozenset(by_id[id(p)] for p in frozen)
    model.frozen = names
    for name, parameter in model.named_parameters():  # peft froze everything but the adapters
        parameter.requires_grad_(name not in names)


@contextmanager
def _stand_ins(layers: list[nn.Linear]) -> Iterator[None]:
    """Lends layers on the meta device CPU weights that take no memory: `peft` makes adapters on the device of the
    weights, and on the meta device they would lose their values."""
    blank = {layer: layer.weight for layer in layers if layer.weight.is_meta}
    for layer, weight in blank.items():
        layer.weight = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape), weight.requires_grad)
    try:
        yield
    finally:
        for layer, weight in blank.items():
            layer.weight = weight


def _adapted(model: Generalist, targets: list[str], kept: set[str]) -> list[nn.Parameter]:
    """Every parameter of the model parts that get adapters, except of modules that are trained in full."""
    parts = {".".join(name.split(".")[:2]) for name in targets}
    full = {id(p) for name in kept for p in model.get_submodule(name).parameters()}
    return [p for name in sorted(parts) for p in model.get_submodule(name).parameters() if id(p) not in full]


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Parameters that keep their start values, whatever a stage trains; empty without adapters."""
    return getattr(model, "frozen", frozenset())


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the model's state that training can change, which is all that a checkpoint needs."""
    frozen = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _matching(pattern: str, names: list[str], key: str) -> list[str]:
    matches = fnmatch.filter(names, pattern)
    if not matches:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})[:12])
        raise UserError(f"lora.{key}: '{pattern}' matches nothing in the model; layers are called {known}", "no_match")
    return matches


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError("lora needs peft; install it with: pip install 'lumen-ray[lora]'", "missing_package") from None
    return peft


def save_adapters(run: Path, state: dict[str, Tensor]) -> None:
    """Writes the adapters alone to `RUN/adapters.safetensors`."""
    write_weights(run / "adapters.safetensors", {name: t for name, t in state.items() if ".lora_" in name})


def plain_name(name: str) -> str:
    """The name, in the model without adapters, of a tensor of the model with them."""
    return name.replace(".base_layer.", ".")


def plain_state(state: dict[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """The weights of the model without adapters, with the adapters merged into them.

    Removes merged tensors from `state`, so that no second copy of the weights is needed.
    """
    out = {}
    for name in list(state):
        if ".lora_A." in name or ".lora_B." in name:
            continue
        value = state.pop(name)
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (state[f"{layer}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            value = (value.float() + settings.alpha / settings.rank * up @ down).to(value.dtype)
        out[plain_name(name)] = value
    return out
