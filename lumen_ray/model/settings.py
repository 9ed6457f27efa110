"""Settings of a model, as in `configs/models/*.yaml`. Keys of the encoders and the LLM are passed to their
`transformers` config classes unchanged, so any size of the same classes can be configured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from lumen_ray import config
from lumen_ray.decoders.registry import DECODERS, decoders_for, dense_readers
from lumen_ray.decoders.spec import DecoderSettings, TrunkShape
from lumen_ray.errors import UserError
from lumen_ray.input_size import PictureSize, SizeRule
from lumen_ray.presets import model_folder
from lumen_ray.targets import MASK_STRIDE
from lumen_ray.tasks import TASKS, get_task
from lumen_ray.trunk.settings import TrunkSettings


class _ModelSettings(TrunkSettings):
    """The trunk, and one optional section per registered decoder (see `ModelSettings`)."""

    published_weights: bool = Field(
        False, description="encoders and LLM have published weights, which 'lumen-ray convert' assembles"
    )
    decoders: dict[str, str] = Field(
        {}, description="the decoder that serves a task, as {TASK: DECODER}; by default the model's first that can"
    )

    @property
    def conversion(self) -> str:
        """The command that writes a model folder `DIR` from published weights."""
        source = "visionllm-v2 CHECKPOINT" if self.prompt_layout == "sequential" else "pretrained ..."
        return f"lumen-ray convert {source} --preset {self.name} DIR"

    @property
    def sections(self) -> dict[str, DecoderSettings]:
        """Settings of the model's decoders by name, in the registry's order."""
        sections = {name: getattr(self, name) for name in DECODERS}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """Names of the model's decoders, in the registry's order."""
        return tuple(self.sections)

    @property
    def families(self) -> tuple[str, ...]:
        """The link families of its decoders."""
        return tuple(dict.fromkeys(DECODERS[name].family for name in self.decoder_names))

    @property
    def reads_dense(self) -> bool:
        """Whether a decoder of this model reads the trunk's dense features."""
        return bool(self.dense_readers)

    @property
    def dense_readers(self) -> frozenset[str]:
        """The decoders that read the trunk's dense features."""
        return dense_readers(self.sections)

    def trunk_shape(self, vocab_size: int) -> TrunkShape:
        """The widths that decoders and link heads are built for."""
        return self.shape(self.llm_config().hidden_size, vocab_size)

    @property
    def input_rules(self) -> dict[str, SizeRule]:
        """Input size rule by decoder, for decoders that do not use the trunk's input."""
        rules = {name: section.input_rule for name, section in self.sections.items()}
        return {name: rule for name, rule in rules.items() if rule is not None}

    @property
    def serving(self) -> dict[str, str]:
        """The decoder that serves each task, without text tasks and tasks that no decoder of the model can serve."""
        able = {task: self.able(task) for task in TASKS}
        return {task: self.decoders.get(task, names[0]) for task, names in able.items() if names}

    def able(self, task: str) -> list[str]:
        """The decoders of this model that can serve a task."""
        return [name for name in decoders_for(task) if name in self.sections]

    def beside(self, decoder: str, tasks: Iterable[str]) -> ModelSettings:
        """These settings with `decoder` for those of `tasks` that it can serve and another decoder serves. Raises
        `UserError` if there is no such decoder or task."""
        if decoder not in self.sections:
            raise UserError(
                f"agree_with is '{decoder}', which the model does not have; its decoders: "
                f"{', '.join(self.decoder_names) or 'none'}",
                "unknown_decoder",
            )
        able = [task for task in dict.fromkeys(tasks) if decoder in self.able(task)]
        others = [task for task in able if self.serving[task] != decoder]
        if able and not others:
            more = [name for name in self.decoder_names if any(name in self.able(task) for task in able)]
            have = ", ".join(name for name in more if name != decoder)
            raise UserError(
                f"agree_with is '{decoder}', which answers {', '.join(able)} itself; give another decoder "
                f"({have or 'this model has none'})",
                "same_decoder",
            )
        if not others:
            serves = ", ".join(task for task in TASKS if decoder in self.able(task))
            raise UserError(
                f"agree_with is '{decoder}', which can serve none of the tasks; it can serve: {serves}",
                "no_common_task",
            )
        return self.choose(dict.fromkeys(others, decoder), "agree_with")

    def choose(self, decoders: Mapping[str, str], origin: str) -> ModelSettings:
        """These settings with other decoders for some tasks, {task: decoder}. Raises `UserError`, with `origin` in
        front, if one cannot serve its task."""
        data = self.model_dump(mode="json") | {"decoders": self.decoders | dict(decoders)}
        return config.validate(ModelSettings, data, origin)

    def chosen_over(self, own: ModelSettings) -> dict[str, str]:
        """{task: decoder} for the tasks whose decoder differs from that in `own`, the same model's stored settings."""
        return {task: decoder for task, decoder in self.serving.items() if decoder != own.serving[task]}

    @property
    def input_step(self) -> int:
        """Height and width of an input must be multiples of this many pixels, so that image tokens, decoder cells and
        dense features tile it."""
        return math.lcm(self.token_side, MASK_STRIDE, *(section.tile for section in self.sections.values()))

    @model_serializer(mode="wrap")
    def _without_absent_plug_ins(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out the sections of other packages' decoders that the model lacks, so that its folder also opens where
        those packages are not installed."""
        data = handler(self)
        absent = [name for name, spec in DECODERS.items() if spec.package and data.get(name) is None]
        return {key: value for key, value in data.items() if key not in absent}

    @model_validator(mode="after")
    def _check_input_rules(self) -> _ModelSettings:
        """A decoder of pictures says in which size it learns them; any other keeps the shape of the image."""
        for name, section in self.sections.items():
            spec, rule = DECODERS[name], section.input_rule
            if any(TASKS[task].result == "image" for task in spec.tasks):
                wrong = not isinstance(rule, PictureSize) and "makes pictures and needs a PictureSize"
            elif section.source(spec.reads) == "pixels":
                wrong = isinstance(rule, PictureSize) and "keeps the shape of images; give a ShortSide or None"
            else:
                wrong = rule is not None and "does not read pixels; give None"
            if wrong:
                origin = f" of package '{spec.package}'" if spec.package else ""
                kind = "None" if rule is None else f"a {type(rule).__name__}"
                raise UserError(f"decoder '{name}'{origin} has {kind} as input_rule, but it {wrong}", "invalid_config")
        return self

    @model_validator(mode="after")
    def _check_decoders(self) -> _ModelSettings:
        for task, decoder in self.decoders.items():
            able = self.able(get_task(task).name)
            if decoder not in able:
                have = f"this model's for it: {', '.join(able)}" if able else "this model has none for it"
                raise UserError(f"decoders: '{decoder}' cannot serve task '{task}'; {have}", "invalid_config")
        return self

    @model_validator(mode="after")
    def _check_grid(self) -> _ModelSettings:
        """Image tokens and decoder cells must tile the input."""
        sizes = self.vision.patch_sizes(self.image_size)
        patches = {f"vision.{name}.patch_size": size for name, size in sizes.items()}
        if len(set(patches.values())) > 1:
            raise UserError(
                "vision.clip and vision.dinov2 need one patch_size to share a grid, got "
                f"{sorted(set(patches.values()))}",
                "invalid_config",
            )
        tiles = {f"{name}.stride": section.tile for name, section in self.sections.items() if section.tile > 1}
        for name, tile in (tiles | patches).items():
            if self.image_size % tile:
                raise UserError(f"image_size {self.image_size} must be a multiple of {name} {tile}", "invalid_config")
        merge, side = self.vision.token_merge, self.image_size // next(iter(patches.values()))
        if side % merge:
            raise UserError(
                f"vision.token_merge {merge} must divide the {side} patches per side",
                "invalid_config",
            )
        return self


if TYPE_CHECKING:
    ModelSettings = _ModelSettings
else:
    # A model's YAML has one optional section per decoder, those of other packages included.
    ModelSettings = create_model(
        "ModelSettings",
        __base__=_ModelSettings,
        __module__=__name__,
        __doc__="Settings of a model: the trunk, and one section per decoder.",
        **{
            spec.name: (spec.settings | None, Field(spec.default, description=spec.description))
            for spec in DECODERS.values()
        },
    )


def read_settings(model: str | Path) -> ModelSettings:
    """Reads the settings of a model folder, or of bundled weights by name. Raises `UserError` if there is no such
    folder or its config.yaml is invalid."""
    return config.load(ModelSettings, model_folder(model) / "config.yaml")
