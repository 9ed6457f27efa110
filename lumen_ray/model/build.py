"""The whole model, and its folder on disk.

A model folder holds `model.safetensors`, `config.yaml` (settings of the preset), `tokenizer.json` (with what
`LumenTokenizer.save` keeps beside it) and `meta.json` (classes and skeletons it was trained with). `load_model` reads
it on any machine, with no hub.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lumen_ray.checkpoints.safetensors_file import WeightsFile, sync, write_weights
from lumen_ray.decoders.base import Decoder, ImageDecoder, LossTerm, anchor
from lumen_ray.decoders.registry import DECODERS, decoder_class, reads_dense, serves
from lumen_ray.errors import UserError
from lumen_ray.meta_init import on_meta, put_weights
from lumen_ray.model.settings import ModelSettings, read_settings
from lumen_ray.precision import cast_weights_
from lumen_ray.presets import model_folder
from lumen_ray.structures import Dtype, check_dtype
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, PerceptionTargets, Pixels
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.tokenizer import CAPTIONS_FILE, NAMES_FILE, LumenTokenizer
from lumen_ray.trunk.trunk import Trunk, TrunkTraining

LM_WEIGHT = 1.0
WEIGHTS = "model.safetensors"


class Generalist(nn.Module):
    """Trunk and decoders. `forward` gives every loss of a batch as sums and normalisers."""

    def __init__(self, settings: ModelSettings, vocab_size: int):
        super().__init__()
        self.settings = settings
        self.trunk = Trunk(settings, vocab_size, settings.sections)
        self.decoders = nn.ModuleDict({name: build_decoder(settings, name) for name in settings.decoder_names})

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every loss `forward` can give, in a fixed order, so that ranks can add up their normalisers."""
        return ("lm", *(name for decoder in self.decoders.values() for name in decoder.loss_names))

    def forward(self, batch: TrainingBatch) -> dict[str, LossTerm]:
        """Losses by name. `each` of "lm" is per branch, of a decoder's losses per prompt of `served_links`.

        Weights that `batch.decoders` and `batch.possible_tasks` rule out get no gradient, so that an optimizer leaves
        them alone.
        """
        out = self.trunk(batch)
        per_branch = out.lm_losses.new_zeros(len(batch.tasks) + 1)
        owner = batch.layout.branch_ids[:, 1:].flatten() + 1  # padding goes to 0
        per_branch.scatter_add_(0, owner, out.lm_losses.detach().flatten())
        wanted = set(self.decoders) if batch.decoders is None else set(batch.decoders)
        total = LM_WEIGHT * out.lm_losses.sum() + self._anchor(wanted, batch.possible_tasks)
        losses = {}
        for name, decoder in self.decoders.items():
            if name in wanted:
                found, zero = decoder.learn(*self._asked(decoder, out, batch), total * 0.0, batch.possible_tasks)
                losses |= found
                total = total + zero
        return {"lm": LossTerm(total, out.lm_tokens, per_branch[1:])} | losses

    @staticmethod
    def _asked(
        decoder: Decoder | ImageDecoder, out: TrunkTraining, batch: TrainingBatch
    ) -> tuple[SuperLink | None, Any, Any]:
        """What a decoder learns from: those links of its family whose task it serves, what it looks at, and targets;
        without such links None."""
        served = served_links(decoder.name, batch) if decoder.name in out.links else []
        if not served:
            return None, None, None
        link, (pixels, targets) = out.links[decoder.name], given(decoder, batch)
        if len(served) < len(link):
            members = torch.tensor(served, device=link.parent.device)
            link, targets = link.select(members), targets.select(members)
        return link, {"dense": out.dense, "pixels": pixels}.get(decoder.reads or ""), targets

    def _anchor(self, decoders: Collection[str], tasks: Collection[str] | None) -> Tensor | float:
        """Zero, with every parameter in its graph of the trunk's optional parts that given decoders and tasks can use.

        Whether a batch has regions, poses, masks or perception prompts at all (without which nothing reads the dense
        features) differs from rank to rank; all ranks must still reduce the same gradients.
        """
        trunk, own = self.trunk, [name for name in self.decoders if name in decoders]
        parts = [trunk.link_heads[name] for name in own]
        if tasks is None or any(TASKS[name].may_have_regions for name in tasks):
            parts.append(trunk.regions)
        if reads_dense(own):
            parts += [trunk.stem, trunk.dense]
        optional = [p for part in parts if part for p in part.parameters()]
        families = {DECODERS[name].family for name in own}
        optional += [p for family in families for p in trunk.queries.of(family, tasks is None or "pose" in tasks)]
        return anchor(optional)


def build_decoder(settings: ModelSettings, name: str) -> Any:
    """One decoder of a model with fresh weights (a `Decoder` or an `ImageDecoder`)."""
    section = settings.sections[name]
    shape = settings.trunk_shape(settings.vocab_size)
    return decoder_class(name).build(section, shape)


def given(decoder: Decoder | ImageDecoder, batch: TrainingBatch) -> tuple[Pixels, PerceptionTargets | ImageTargets]:
    """The images of a training batch as a decoder looks at them, and what it should find there: in its own size, where
    it has one, or as the trunk sees them."""
    pixels = batch.pixels.get(decoder.name) or Pixels(batch.images, batch.extents)
    own = decoder.name in batch.targets  # in the frame of its own input size
    return pixels, batch.targets[decoder.name if own else decoder.family]


def served_links(decoder: str, batch: TrainingBatch) -> list[int]:
    """Which links of the decoder's family in a training batch are of tasks that it serves, in order."""
    branches = batch.layout.link_branches[DECODERS[decoder].family].tolist()
    return [link for link, i in enumerate(branches) if serves(decoder, batch.tasks[i])]


@dataclass
class ModelMeta:
    """What a trained model knows about its training data."""

    preset: str
    classes: list[str] = field(default_factory=list)
    skeletons: dict[str, list[str]] = field(default_factory=dict)
    edges: dict[str, list[list[int]]] = field(default_factory=dict)
    buckets: list[list[int]] = field(default_factory=list)  # [height, width]; none: the square of the preset
    tasks: list[str] = field(default_factory=list)  # that it was trained for; none: nobody knows
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
    """Writes a model folder. One with weights is complete, also after a kill or a crash while another model was there.

    All of it is written aside and flushed to the disk first; then the weights are the first to go and the last to come.
    """
    folder = Path(folder)
    aside = folder / ".partial"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir(parents=True)
    try:
        (aside / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        tokenizer.save(aside / "tokenizer.json")
        (aside / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
        write_weights(aside / WEIGHTS, state)
        for path in aside.iterdir():
            sync(path)
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _publish(aside: Path, folder: Path) -> None:
    """Moves the files of a model from `aside` into `folder`, which may hold another model."""
    names = {path.name for path in aside.iterdir()} - {WEIGHTS}
    (folder / WEIGHTS).unlink(missing_ok=True)
    sync(folder)
    for name in {NAMES_FILE, CAPTIONS_FILE} - names:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(aside / name, folder / name)
    sync(folder)
    os.replace(aside / WEIGHTS, folder / WEIGHTS)
    sync(folder)


@dataclass
class LoadedModel:
    """A model and what its folder says of it. Decoders may still be without their weights, which `weights` then has."""

    model: Generalist
    settings: ModelSettings
    tokenizer: LumenTokenizer
    meta: ModelMeta
    version: str  # first 12 hex digits of the sha256 of the weights file; empty where the trunk was not read
    chosen: dict[str, str] = field(default_factory=dict)  # task -> decoder, where it is not what the folder says
    dtype: Dtype = "float32"  # of its weights and arithmetic where it answers
    weights: WeightsFile | None = None

    def decoder(self, name: str, device: torch.device | str = "cpu") -> Decoder | ImageDecoder:
        """A decoder on a device, its weights read if they are not yet. `UserError` where the model has none such."""
        if name not in self.model.decoders:
            have = ", ".join(self.model.decoders)
            raise UserError(f"the model has no decoder '{name}'; decoders: {have}", "unknown_decoder")
        return self._ready(self.model.decoders[name], f"decoders.{name}", device)

    def trunk(self, device: torch.device | str = "cpu") -> Trunk:
        """The trunk on a device, its weights read if they are not yet."""
        return self._ready(self.model.trunk, "trunk", device)

    def _ready(self, part: nn.Module, prefix: str, device: torch.device | str) -> Any:
        cast_weights_(part, self.dtype)
        if any(p.is_meta for p in part.parameters()):
            put_weights(part, lambda key: self.weights[f"{prefix}.{key}"], device)
        return part.to(device)


def read_meta(folder: str | Path) -> ModelMeta:
    """What a model folder (or bundled weights, by name) says about its training data; `UserError` when it is none."""
    folder = model_folder(folder)
    for name in ("config.yaml", "tokenizer.json", "meta.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"'{folder}' is not a model folder: {name} is missing; give the 'model' folder a training run wrote",
                "not_a_model",
            )
    try:
        return ModelMeta(**json.loads((folder / "meta.json").read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(
            f"'{folder / 'meta.json'}' is damaged or of another version: {error}", "damaged_model"
        ) from None


def read_tokenizer(folder: str | Path) -> LumenTokenizer:
    """The tokenizer of the model in a folder (or bundled weights, by name); `UserError` when it is damaged."""
    file = model_folder(folder) / "tokenizer.json"
    try:
        return LumenTokenizer.load(file)
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(
            f"'{file}', or what is kept beside it, is damaged: {str(error).splitlines()[0]}", "damaged_model"
        ) from None


def open_weights(folder: str | Path) -> WeightsFile:
    """The weights of the model in a folder (or bundled weights, by name); `UserError` when they are damaged."""
    return WeightsFile(model_folder(folder) / WEIGHTS)


def load_model(
    folder: str | Path,
    decoders: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    parts: Collection[str] | None = None,
    dtype: str = "float32",
) -> LoadedModel:
    """The model in a folder (or bundled weights, by name), in eval mode.

    decoders: task -> the decoder that serves it, where it should be another than the folder's settings say. parts:
    "trunk" and names of decoders, those to be read, all by default; the others have no weights. dtype: in which the
    model is to answer, and its weights are stored.
    What is read goes to the device tensor by tensor. Raises `UserError` when it is not a model folder or is damaged,
    for a decoder that cannot serve its task, and for one that the model has not.
    """
    dtype = check_dtype(dtype)
    meta, own, tokenizer = read_meta(folder), read_settings(folder), read_tokenizer(folder)
    settings = own.choose(decoders or {}, str(folder))
    weights = open_weights(folder)
    with on_meta():
        model = build_model(settings, len(tokenizer)).eval()
    _check_fits(weights, model, settings.name)
    parts = {"trunk", *model.decoders} if parts is None else set(parts)
    version = weights.digest()[:12] if "trunk" in parts else ""
    chosen = settings.chosen_over(own)
    loaded = LoadedModel(model, settings, tokenizer, meta, version, chosen, dtype, weights)
    if "trunk" in parts:
        loaded.trunk(device)
    for name in parts - {"trunk"}:
        loaded.decoder(name, device)
    return loaded


def _check_fits(weights: WeightsFile, model: Generalist, preset: str) -> None:
    """`UserError` unless the file has the tensors of the model, no more and no less."""
    found, expected = weights.shapes(), model.state_dict()
    if wrong := [*(n for n in expected if n not in found), *(n for n in found if n not in expected)]:
        raise UserError(f"'{weights.path}' does not fit its config.yaml: check {', '.join(wrong[:3])}", "damaged_model")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"'{weights.path}' cannot be loaded into preset '{preset}': {name} is {list(found[name].shape)}, by "
                f"the settings {list(tensor.shape)}",
                "damaged_model",
            )
