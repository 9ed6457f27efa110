"""Settings of a model: what `configs/models/*.yaml` says. Widths of the encoders and the LLM are passed to their
`transformers` config classes unchanged, so any size of the same classes can be described."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings, StableDiffusionSettings
from lumen_ray.decoders.dino.settings import DinoSettings
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.decoders.lumen.settings import LumenSettings
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.errors import UserError, suggest
from lumen_ray.input_size import SizeRule
from lumen_ray.presets import model_folder
from lumen_ray.structures import Size
from lumen_ray.tasks import DECODERS, TASKS, get_task
from lumen_ray.trunk.settings import RegionSettings, VisionSettings, _check_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ModelSettings(Settings):
    name: str = Field(description="preset name; kept in checkpoints and checked when they are loaded")
    published_weights: bool = Field(
        False, description="encoders and LLM start from published checkpoints, which 'lumen-ray convert' puts together"
    )
    image_size: int = Field(
        gt=0,
        description="side in pixels of the square that the encoders' positions are made for, and of the input where a "
        "recipe names no buckets",
    )
    vision: VisionSettings
    regions: RegionSettings = RegionSettings()
    llm: dict[str, Any] = Field(description="`model_type` and the keys of its transformers config class")
    prefix_attention: Literal["causal", "full"] = Field(
        "causal", description="attention among image tokens; 'causal' for LLMs that were pretrained so"
    )
    prompt_layout: Literal["branches", "sequential"] = Field(
        "branches",
        description="'branches': each class or phrase sees the image and itself; 'sequential': those of an image in "
        "one causal string, as the released VisionLLM v2 weights were trained",
    )
    lead_tokens: tuple[int, ...] = Field(
        (), description="token ids in front of the image: the LLM's beginning of a sequence, its system message"
    )
    dense_channels: int = Field(64, gt=0, description="channels of the shared dense features")
    stem_channels: int = Field(32, gt=0, description="channels of the convolutional stem at stride 4")
    tokens_read_stem: bool = Field(
        False, description="image tokens also read the convolutional stem; for encoders that are trained from scratch"
    )
    link_channels: int = Field(256, gt=0, description="width of the light decoder's link embeddings")
    link_reads_words: bool = Field(
        False, description="links also read the instruction's words; for an LLM that is trained from scratch"
    )
    vocab_size: int = Field(512, gt=0, description="size of a tokenizer trained from scratch, special tokens included")
    lumen: LumenSettings | None = Field(LumenSettings(), description="the light decoder; null: the model has none")
    grounding_dino: GroundingDinoSettings | None = Field(None, description="detects, grounds and segments")
    unipose: UniPoseSettings | None = Field(None, description="finds poses")
    pose_queries: bool = Field(
        False, description="keypoint prompts have super-link queries of their own, as in the released VisionLLM v2"
    )
    stable_diffusion: StableDiffusionSettings | None = Field(None, description="generates pictures")
    instruct_pix2pix: InstructPix2PixSettings | None = Field(None, description="edits pictures")
    decoders: dict[str, str] = Field(
        {}, description="which decoder serves a task, as {detect: lumen}; those left out: the first the model has"
    )

    @property
    def conversion(self) -> str:
        """The command that makes a model folder `DIR` of the published weights."""
        source = "visionllm-v2 CHECKPOINT" if self.prompt_layout == "sequential" else "pretrained ..."
        return f"lumen-ray convert {source} --preset {self.name} DIR"

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """The decoders this model has, in the registry's order."""
        return tuple(name for name in DECODERS if getattr(self, name) is not None)

    @property
    def families(self) -> tuple[str, ...]:
        """Of super-link queries, those that its decoders read."""
        return tuple(dict.fromkeys(DECODERS[name].family for name in self.decoder_names))

    def link_width(self, decoder: str) -> int:
        """Channels of the link embeddings of a decoder of places."""
        own = getattr(self, decoder)
        return own.hidden_size if isinstance(own, DinoSettings) else self.link_channels

    @property
    def own_sizes(self) -> dict[str, SizeRule]:
        """Decoder -> the size of the images it looks at or learns to make, of those that do not take the trunk's."""
        rules = {name: getattr(getattr(self, name), "own_size", None) for name in self.decoder_names}
        return {name: rule for name, rule in rules.items() if rule is not None}

    @property
    def serving(self) -> dict[str, str]:
        """Task -> the decoder that serves it; without texts, and without what the model has no decoder for."""
        able = {t.name: [name for name in t.decoders if name in self.decoder_names] for t in TASKS.values()}
        return {task: self.decoders.get(task, names[0]) for task, names in able.items() if names}

    def choose(self, decoders: Mapping[str, str], origin: str) -> ModelSettings:
        """These settings with other `decoders` for the tasks named; a `UserError`, which begins with `origin`, for one
        that cannot serve its task."""
        data = self.model_dump(mode="json") | {"decoders": self.decoders | dict(decoders)}
        return config.validate(ModelSettings, data, origin)

    def chosen_over(self, own: ModelSettings) -> dict[str, str]:
        """Task -> decoder, for the tasks that another decoder serves than in the same model's `own` settings."""
        return {task: decoder for task, decoder in self.serving.items() if decoder != own.serving[task]}

    def llm_config(self, **more: Any) -> PretrainedConfig:
        """The library's config of the LLM, with `more` keys."""
        from transformers import AutoConfig

        keys = dict(self.llm)
        return AutoConfig.for_model(keys.pop("model_type"), **keys, **more)

    @property
    def token_side(self) -> int:
        """Input pixels per side of one image token."""
        encoder, *_ = self.vision.configs(self.image_size).values()  # both share a grid
        return encoder.patch_size * self.vision.token_merge

    def image_tokens(self, size: Size) -> int:
        """The number of LLM tokens of an input of (height, width) pixels, those in front of it included."""
        return (size[0] // self.token_side) * (size[1] // self.token_side) + len(self.lead_tokens)

    @property
    def input_step(self) -> int:
        """What height and width of an input must be multiples of: image tokens, the decoder's places and the dense
        features at stride 4 tile it."""
        return math.lcm(self.token_side, self.lumen.stride if self.lumen else 1, 4)

    @model_validator(mode="after")
    def _check_decoders(self) -> ModelSettings:
        for task, decoder in self.decoders.items():
            able = [name for name in get_task(task).decoders if name in self.decoder_names]
            if decoder not in able:
                have = f"this model's for it: {', '.join(able)}" if able else "this model has none for it"
                raise UserError(f"decoders: '{decoder}' cannot serve task '{task}'; {have}", "invalid_config")
        return self

    @model_validator(mode="after")
    def _check_llm(self) -> ModelSettings:
        from transformers import CONFIG_MAPPING

        if "model_type" not in self.llm:
            raise UserError("llm: 'model_type' is required, e.g. llama or qwen3", "invalid_config")
        if (kind := self.llm["model_type"]) not in CONFIG_MAPPING:
            raise UserError(
                f"unknown llm.model_type '{kind}';{suggest(str(kind), CONFIG_MAPPING.keys())} give a model type that "
                "transformers knows, e.g. llama or qwen3",
                "invalid_config",
            )
        keys = {key: value for key, value in self.llm.items() if key != "model_type"}
        _check_keys("llm", keys, CONFIG_MAPPING[kind])
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> ModelSettings:
        if self.regions.kind == "levels" and self.vision.bridge != "mlp2x_gelu":
            raise UserError("regions.kind 'levels' needs vision.bridge 'mlp2x_gelu'", "invalid_config")
        if self.vision.bridge != "comm" and self.tokens_read_stem:
            raise UserError("tokens_read_stem needs vision.bridge 'comm'", "invalid_config")
        if (self.lead_tokens or self.prompt_layout == "sequential") and self.prefix_attention != "causal":
            raise UserError(
                "prompt_layout 'sequential' and lead_tokens need prefix_attention 'causal'", "invalid_config"
            )
        if self.prompt_layout == "sequential" and self.link_reads_words:
            raise UserError("link_reads_words needs prompt_layout 'branches'", "invalid_config")
        return self

    @model_validator(mode="after")
    def _check_grid(self) -> ModelSettings:
        """Image tokens and the decoder's places must tile the input."""
        tiles = {"lumen.stride": self.lumen.stride} if self.lumen else {}
        for name, encoder in self.vision.configs(self.image_size).items():
            tiles[f"vision.{name}.patch_size"] = encoder.patch_size
        patches = {size for name, size in tiles.items() if name != "lumen.stride"}
        if len(patches) > 1:
            raise UserError(
                f"vision.clip and vision.dinov2 need one patch_size to share a grid, got {sorted(patches)}",
                "invalid_config",
            )
        for name, tile in tiles.items():
            if self.image_size % tile:
                raise UserError(f"image_size {self.image_size} must be a multiple of {name} {tile}", "invalid_config")
        merge, side = self.vision.token_merge, self.image_size // patches.pop()
        if side % merge:
            raise UserError(
                f"vision.token_merge {merge} must divide the {side} patches per side",
                "invalid_config",
            )
        return self


def read_settings(model: str | Path) -> ModelSettings:
    """What a model folder, or bundled weights by name, is made of; `UserError` when there is no such folder or its
    config.yaml does not fit."""
    return config.load(ModelSettings, model_folder(model) / "config.yaml")
