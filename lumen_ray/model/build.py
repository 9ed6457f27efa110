"""The whole model, and its folder on disk.

A model folder holds `model.safetensors`, `config.yaml` (settings of the preset), `tokenizer.json` and `meta.json`
(classes and skeletons it was trained with). `load_model` reads it on any machine, with no hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lumen_ray import config
from lumen_ray.decoders.base import LossTerm
from lumen_ray.decoders.lumen import LumenDecoder
from lumen_ray.errors import UserError
from lumen_ray.model.settings import ModelSettings
from lumen_ray.model.tokenizer import LumenTokenizer
from lumen_ray.model.trunk import Trunk

LM_WEIGHT = 1.0


class Generalist(nn.Module):
    """Trunk and decoders. `forward` gives every loss of a batch as sums and normalisers."""

    def __init__(self, settings: ModelSettings, vocab_size: int):
        super().__init__()
        self.settings = settings
        self.trunk = Trunk(settings, vocab_size)
        self.decoders = nn.ModuleDict(
            {"lumen": LumenDecoder(settings.lumen, settings.dense_channels, settings.link_channels)}
        )

    def forward(self, batch: dict) -> tuple[dict[str, LossTerm], Tensor]:
        """Losses by name, and the unreduced LM losses [B, T - 1] for the per-task log."""
        out = self.trunk(batch)
        losses = {"lm": LossTerm(LM_WEIGHT * out.lm_loss_sum, out.lm_tokens)}
        for decoder in self.decoders.values():
            link = out.links.get(decoder.family)
            if link is None:
                continue
            raw = decoder(link, out.dense)
            losses |= decoder.loss(raw, batch["targets"][decoder.family])
        return losses, out.lm_losses


@dataclass
class ModelMeta:
    """What a trained model knows about its training data."""

    preset: str
    classes: list[str] = field(default_factory=list)
    skeletons: dict[str, list[str]] = field(default_factory=dict)
    edges: dict[str, list[list[int]]] = field(default_factory=dict)
    recipe: str = ""
    steps: int = 0
    seed: int = 0


def build_model(settings: ModelSettings, vocab_size: int, seed: int = 0) -> Generalist:
    """A model with fresh weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generalist(settings, vocab_size)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def save_model(
    folder: str | Path, state: dict[str, Tensor], settings: ModelSettings, tokenizer: LumenTokenizer, meta: ModelMeta
) -> Path:
    """Writes a model folder; the weights last, by an atomic rename, so a folder with weights is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    tokenizer.save(folder / "tokenizer.json")
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors.tmp")
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    return folder


@dataclass
class LoadedModel:
    model: Generalist
    settings: ModelSettings
    tokenizer: LumenTokenizer
    meta: ModelMeta
    version: str  # first 12 hex digits of the sha256 of the weights file


def load_model(folder: str | Path, expect_preset: str | None = None) -> LoadedModel:
    """The model in a folder, in eval mode on the CPU. `UserError` when it is not a model folder, is damaged, or was
    trained with another preset than `expect_preset`."""
    folder = Path(folder)
    for name in ("config.yaml", "tokenizer.json", "meta.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"'{folder}' is not a model folder: {name} is missing; give the 'model' folder a training run wrote",
                "not_a_model",
            )
    settings = config.load(ModelSettings, folder / "config.yaml")
    if expect_preset and settings.name != expect_preset:
        raise UserError(
            f"'{folder}' holds a checkpoint of preset '{settings.name}', not '{expect_preset}'; "
            f"give a checkpoint of '{expect_preset}' or choose preset '{settings.name}'",
            "wrong_preset",
        )
    tokenizer = LumenTokenizer.load(folder / "tokenizer.json")
    meta = ModelMeta(**json.loads((folder / "meta.json").read_text()))
    weights = folder / "model.safetensors"
    model = build_model(settings, len(tokenizer))
    try:
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"'{weights}' cannot be loaded into preset '{settings.name}': {reason}", "damaged_model") from None
    if missing or unexpected:
        names = ", ".join((missing + unexpected)[:3])
        raise UserError(f"'{weights}' does not fit its config.yaml: check {names}", "damaged_model")
    version = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return LoadedModel(model.eval(), settings, tokenizer, meta, version)
