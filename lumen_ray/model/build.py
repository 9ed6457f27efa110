"""The whole model, and its folder on disk.

A model folder holds `model.safetensors`, `config.yaml` (the settings), `tokenizer.json` (and other files of
`LumenTokenizer.save`) and `meta.json` (classes and skeletons of its training data). `load_model` reads it on any
machine, without access to a hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from lumen_ray.checkpoints.safetensors_file import WeightsFile, sync, write_weights
from lumen_ray.cpu_linear import use_onednn
from lumen_ray.decoders.base import Decoder, ImageDecoder, Learner, LossTerm, anchor
from lumen_ray.decoders.registry import DECODERS, decoder_class, serves
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
from lumen_ray.trunk.tokenizer import EXTRA_FILES, LumenTokenizer
from lumen_ray.trunk.trunk import Trunk, TrunkTraining

LM_WEIGHT = 1.0
WEIGHTS = "model.safetensors"
#: weights with a row per token of the LLM: input embedding and output projection
VOCABULARY = ("trunk.llm.model.embed_tokens.weight", "trunk.llm.lm_head.weight")


class Generalist(nn.Module):
    """Trunk and decoders. `forward` returns every loss of a batch as a sum and its normaliser."""

    def __init__(self, settings: ModelSettings, vocab_size: int):
        super().__init__()
        self.settings = settings
        self.trunk = Trunk(settings, vocab_size, settings.sections)
        self.decoders = nn.ModuleDict({name: build_decoder(settings, name) for name in settings.decoder_names})
        use_onednn(self)
        #: parameters that keep their start values, whatever a stage trains
        self.frozen: frozenset[str] = frozenset()
        if settings.image_adapters:
            llm = (name for name, _ in self.trunk.named_parameters(prefix="trunk") if name.startswith("trunk.llm."))
            self.frozen = frozenset(name for name in llm if ".lora_" not in name) - {*VOCABULARY}

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every loss that `forward` can return, in a fixed order, so that ranks can add up their normalisers."""
        return ("lm", *(name for _, decoder in self._learners() for name in decoder.loss_names))

    def _learners(self) -> Iterator[tuple[str, Learner]]:
        return ((name, cast(Learner, decoder)) for name, decoder in self.decoders.items())

    def forward(self, batch: TrainingBatch) -> dict[str, LossTerm]:
        """Losses by name. `each` of "lm" is per branch, of a decoder's losses per prompt of `served_links`.

        Weights that `batch.decoders` and `batch.possible_tasks` exclude get no gradient, so an optimizer skips them.
        """
        out = self.trunk(batch)
        per_branch = out.lm_losses.new_zeros(len(batch.tasks) + 1)
        owner = batch.layout.branch_ids[:, 1:].flatten() + 1  # padding goes to 0
        per_branch.scatter_add_(0, owner, out.lm_losses.detach().flatten())
        wanted = set(self.decoders) if batch.decoders is None else set(batch.decoders)
        total = LM_WEIGHT * out.lm_losses.sum() + self._anchor(wanted, batch.possible_tasks)
        losses: dict[str, LossTerm] = {}
        for name, decoder in self._learners():
            if name in wanted:
                inputs = self._decoder_inputs(decoder, out, batch)
                terms, zero = decoder.learn(*inputs, total * 0.0, batch.possible_tasks)
                losses |= terms
                total = total + zero
        return {"lm": LossTerm(total, out.lm_tokens, per_branch[1:])} | losses

    @staticmethod
    def _decoder_inputs(
        decoder: Learner, out: TrunkTraining, batch: TrainingBatch
    ) -> tuple[SuperLink | None, Any, Any]:
        """The link of the prompts whose task the decoder serves, its dense features or pixels, and its targets; all
        None if there are no such prompts."""
        served = served_links(decoder.name, batch) if decoder.name in out.links else []
        if not served:
            return None, None, None
        link, (pixels, targets) = out.links[decoder.name], images_and_targets(decoder, batch)
        if len(served) < len(link):
            members = torch.tensor(served, device=link.parent.device)
            link, targets = link.select(members), targets.select(members)
        return link, {"dense": out.dense, "pixels": pixels}.get(decoder.reads or ""), targets

    def _anchor(self, decoders: Collection[str], tasks: Collection[str] | None) -> Tensor | float:
        """Zero, with all parameters of the trunk's optional modules in its graph that these decoders and tasks can use.

        Whether a batch has regions, poses, masks or perception prompts (which read the dense features) differs between
        ranks; all ranks must still reduce the same gradients.
        """
        trunk, names = self.trunk, [name for name in self.decoders if name in decoders]
        modules: list[nn.Module | None] = [trunk.link_heads[name] for name in names]
        if tasks is None or any(TASKS[name].may_have_regions for name in tasks):
            modules.append(trunk.regions)
        if trunk.dense_readers.intersection(names):
            modules += [trunk.stem, trunk.dense]
        optional = [p for module in modules if module for p in module.parameters()]
        families = {DECODERS[name].family for name in names}
        optional += [p for family in families for p in trunk.queries.of(family, tasks is None or "pose" in tasks)]
        return anchor(optional)


def build_decoder(settings: ModelSettings, name: str) -> Any:
    """Builds one decoder of a model (a `Decoder` or an `ImageDecoder`) with fresh weights."""
    section = settings.sections[name]
    shape = settings.trunk_shape(settings.vocab_size)
    return decoder_class(name).build(section, shape)


def images_and_targets(decoder: Learner, batch: TrainingBatch) -> tuple[Pixels, PerceptionTargets | ImageTargets]:
    """The images and targets of a training batch for a decoder: in the decoder's input size if it has a size rule, else
    the trunk's."""
    pixels = batch.pixels.get(decoder.name) or Pixels(batch.images, batch.extents)
    own = decoder.name in batch.targets  # in the frame of its own input size
    return pixels, batch.targets[decoder.name if own else decoder.family]


def served_links(decoder: str, batch: TrainingBatch) -> list[int]:
    """Indices of the links of the decoder's family in a training batch whose task it serves, ascending."""
    tasks = batch.layout.link_tasks(DECODERS[decoder].family, batch.tasks)
    return [link for link, task in enumerate(tasks) if serves(decoder, task)]


@dataclass
class ModelMeta:
    """The training data and run of a model, as in its `meta.json`."""

    preset: str
    classes: list[str] = field(default_factory=list)
    skeletons: dict[str, list[str]] = field(default_factory=dict)
    edges: dict[str, list[list[int]]] = field(default_factory=dict)
    buckets: list[list[int]] = field(default_factory=list)  # [height, width]; empty: the preset's square input
    tasks: list[str] = field(default_factory=list)  # tasks it was trained for; empty: unknown
    recipe: str = ""
    steps: int = 0
    seed: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)  # see `inference.calibration`; empty: scores as they are
    #: whether it has learned to go on with a text behind a routing token and its queries
    writes_behind_routes: bool = False
    #: whether it was trained with classes given by example
    reads_exemplars: bool = False
    #: of the best model of a run: by which metric of its validation, with which value, after which step
    validation: dict[str, Any] = field(default_factory=dict)


def build_model(settings: ModelSettings, vocab_size: int, seed: int = 0) -> Generalist:
    """Builds a model with fresh weights, deterministic in `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generalist(settings, vocab_size)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def save_model(
    folder: str | Path, state: dict[str, Tensor], settings: ModelSettings, tokenizer: LumenTokenizer, meta: ModelMeta
) -> Path:
    """Writes a model folder, tied weights once. A folder with a weights file is always complete, even if the process is
    killed or the machine crashes while it overwrites another model.

    All files are written to a subfolder and flushed to disk first; then the old weights are removed before all other
    files are moved, and the new ones are moved last.
    """
    folder = Path(folder)
    aside = folder / ".partial"
    shutil.rmtree(aside, ignore_errors=True)  # left by a save that was killed
    aside.mkdir(parents=True)
    try:
        (aside / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        tokenizer.save(aside / "tokenizer.json")
        (aside / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
        tied = tied_weights(settings)
        write_weights(aside / WEIGHTS, {name: tensor for name, tensor in state.items() if name not in tied})
        for path in aside.iterdir():
            sync(path)
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _publish(aside: Path, folder: Path) -> None:
    """Moves a model's files from `aside` to `folder`, which may hold another model."""
    names = {path.name for path in aside.iterdir()} - {WEIGHTS}
    (folder / WEIGHTS).unlink(missing_ok=True)
    sync(folder)
    for name in set(EXTRA_FILES) - names:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(aside / name, folder / name)
    sync(folder)
    os.replace(aside / WEIGHTS, folder / WEIGHTS)
    sync(folder)


@dataclass
class LoadedModel:
    """A model with the contents of its folder. Modules may still be on the meta device; `weights` then holds theirs."""

    model: Generalist
    settings: ModelSettings
    tokenizer: LumenTokenizer
    meta: ModelMeta
    version: str  # 12 hex digits of a sha256 of weights and calibration; empty if the trunk was not read
    chosen: dict[str, str] = field(default_factory=dict)  # {task: decoder} that differ from the folder's settings
    dtype: Dtype = "float32"  # of its weights and arithmetic at inference
    weights: Mapping[str, Tensor] | None = None

    def decoder(self, name: str, device: torch.device | str = "cpu") -> Decoder | ImageDecoder:
        """A decoder on a device; reads its weights if needed. Raises `UserError` if the model has no such decoder."""
        if name not in self.model.decoders:
            have = ", ".join(self.model.decoders)
            raise UserError(f"the model has no decoder '{name}'; decoders: {have}", "unknown_decoder")
        return self._ready(self.model.decoders[name], f"decoders.{name}", device)

    def trunk(self, device: torch.device | str = "cpu") -> Trunk:
        """The trunk on a device; reads its weights if needed."""
        return self._ready(self.model.trunk, "trunk", device)

    def _ready(self, module: nn.Module, prefix: str, device: torch.device | str) -> Any:
        cast_weights_(module, self.dtype)
        if any(p.is_meta for p in module.parameters()):
            weights = self.weights
            assert weights is not None, "a module on the meta device has its weights there"
            put_weights(module, lambda key: weights[f"{prefix}.{key}"], device)
        return module.to(device)


def read_meta(folder: str | Path) -> ModelMeta:
    """Reads `meta.json` of a model folder, or of bundled weights by name. Raises `UserError` if it is not a model
    folder."""
    folder = model_folder(folder)
    for name in ("config.yaml", "tokenizer.json", "meta.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"'{folder}' is not a model folder: {name} is missing; give the 'model' folder of a training run",
                "not_a_model",
            )
    try:
        return ModelMeta(**json.loads((folder / "meta.json").read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(
            f"'{folder / 'meta.json'}' is damaged or of another version: {error}", "damaged_model"
        ) from None


def write_meta(folder: str | Path, meta: ModelMeta) -> None:
    """Replaces `meta.json` of a model folder."""
    temporary = Path(folder) / f".meta.json.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(asdict(meta), indent=1))
        sync(temporary)
        os.replace(temporary, Path(folder) / "meta.json")
    finally:
        temporary.unlink(missing_ok=True)


def read_tokenizer(folder: str | Path) -> LumenTokenizer:
    """Reads the tokenizer of a model folder, or of bundled weights by name. Raises `UserError` if it is damaged."""
    file = model_folder(folder) / "tokenizer.json"
    try:
        return LumenTokenizer.load(file)
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(
            f"'{file}' or a file of the tokenizer beside it is damaged: {str(error).splitlines()[0]}", "damaged_model"
        ) from None


def tied_weights(settings: ModelSettings) -> dict[str, str]:
    """{name: name of the tensor that it is} of tensors that a model has once: the output projection of an LLM that is
    its word embedding."""
    inner, outer = VOCABULARY
    return {outer: inner} if settings.llm.get("tie_word_embeddings") else {}


def open_weights(folder: str | Path) -> WeightsFile:
    """Opens the weights of a model folder, or of bundled weights by name. Raises `UserError` if they are damaged."""
    return WeightsFile(model_folder(folder) / WEIGHTS, tied_weights(read_settings(folder)))


def load_model(
    folder: str | Path,
    decoders: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    parts: Collection[str] | None = None,
    dtype: str = "float32",
) -> LoadedModel:
    """Loads the model in a folder, or bundled weights by name, in eval mode.

    decoders: {task: decoder} that override the folder's settings. parts: "trunk" and names of decoders whose weights to
    read, by default all; the others stay on the meta device. dtype: of weights and arithmetic at inference.
    Tensors go to the device one by one. Raises `UserError` if it is not a model folder or is damaged, if a decoder
    cannot serve its task, or if the model lacks a decoder.
    """
    weights_dtype = check_dtype(dtype)
    here = model_folder(folder)  # once: at a URL the next one may have another version
    meta, stored, tokenizer = read_meta(here), read_settings(here), read_tokenizer(here)
    settings = stored.choose(decoders or {}, str(folder))
    weights = open_weights(here)
    with on_meta():
        model = build_model(settings, len(tokenizer)).eval()
    _check_fits(weights, model, settings.name)
    parts = {"trunk", *model.decoders} if parts is None else set(parts)
    version = _version(weights, meta) if "trunk" in parts else ""
    chosen = settings.chosen_over(stored)
    loaded = LoadedModel(model, settings, tokenizer, meta, version, chosen, weights_dtype, weights)
    if "trunk" in parts:
        loaded.trunk(device)
    for name in parts - {"trunk"}:
        loaded.decoder(name, device)
    return loaded


def model_version(folder: str | Path) -> str:
    """`LoadedModel.version` of a model folder, without loading it; reads the whole weights file."""
    return _version(open_weights(folder), read_meta(folder))


def _version(weights: WeightsFile, meta: ModelMeta) -> str:
    """`LoadedModel.version`: calibrated, a model gives other answers, so it is another version."""
    digest = weights.digest()
    if meta.calibration:
        curves = json.dumps(meta.calibration, sort_keys=True)
        digest = hashlib.sha256(f"{digest} {curves}".encode()).hexdigest()
    return digest[:12]


def _check_fits(weights: WeightsFile, model: Generalist, preset: str) -> None:
    """Raises `UserError` unless the file has exactly the model's tensors."""
    stored, expected = weights.shapes(), model.state_dict()
    if wrong := [*(n for n in expected if n not in stored), *(n for n in stored if n not in expected)]:
        raise UserError(f"'{weights.path}' does not fit its config.yaml: check {', '.join(wrong[:3])}", "damaged_model")
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"'{weights.path}' cannot be loaded into preset '{preset}': {name} has shape "
                f"{list(stored[name].shape)}, the settings need {list(tensor.shape)}",
                "damaged_model",
            )
