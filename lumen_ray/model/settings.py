"""Settings of a model: what `configs/models/*.yaml` says. Widths of the encoders and the LLM are passed to their
`transformers` config classes unchanged, so any size of the same classes can be described."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.decoders.settings import (
    DinoSettings,
    GroundingDinoSettings,
    InstructPix2PixSettings,
    StableDiffusionSettings,
    UniPoseSettings,
)
from lumen_ray.decoders.sizes import SizeRule
from lumen_ray.errors import UserError, suggest
from lumen_ray.presets import model_folder
from lumen_ray.structures import Size
from lumen_ray.tasks import DECODERS, TASKS, get_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: keys that `transformers` reads from published config files though its classes have no such field
_LEGACY_KEYS = ("rope_theta", "rope_scaling")


def _check_keys(where: str, keys: dict[str, Any], config_class: type) -> None:
    """`transformers` takes unknown keys in silence; a typo there must not train another model than was meant."""
    valid = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map) | set(_LEGACY_KEYS)
    for key in keys:
        if key not in valid:
            raise UserError(
                f"unknown key '{where}.{key}';{suggest(key, valid)} valid keys are those of transformers."
                f"{config_class.__name__}",
                "invalid_config",
            )


class VisionSettings(Settings):
    """COMM (arXiv 2310.08825, sec. 3): two encoders, merged over layers. Either may be null; not both."""

    clip: dict[str, Any] | None = Field(None, description="keys of transformers.CLIPVisionConfig; null switches it off")
    dinov2: dict[str, Any] | None = Field(None, description="keys of transformers.Dinov2Config; null switches it off")
    bridge: Literal["comm", "mlp2x_gelu"] = Field(
        "comm",
        description="how encoders become image tokens: 'comm' merges layers of both; 'mlp2x_gelu' is the 2-layer MLP "
        "of LLaVA and VisionLLM v2 on one layer of CLIP",
    )
    clip_layers: Literal["all", "last", "penultimate"] = Field(
        "all", description="CLIP layers that are merged; with bridge 'mlp2x_gelu' the one that is read"
    )
    dinov2_layers: Literal["all", "last_quarter", "last"] = Field("last_quarter", description="DINOv2 layers merged")
    token_merge: int = Field(1, gt=0, description="image tokens per side that become one LLM token (pixel shuffle)")
    mlp_ratio: int = Field(4, description="hidden width of DINOv2's 2-layer MLP, relative to its output")

    @model_validator(mode="after")
    def _one_encoder(self) -> VisionSettings:
        if self.clip is None and self.dinov2 is None:
            raise UserError("at least one of 'clip' and 'dinov2' must be set", "invalid_config")
        if self.bridge == "mlp2x_gelu" and (self.clip is None or self.dinov2 is not None or self.clip_layers == "all"):
            raise UserError(
                "bridge 'mlp2x_gelu' reads one layer of CLIP alone; set dinov2 to null and clip_layers to 'last' or "
                "'penultimate'",
                "invalid_config",
            )
        if self.bridge == "comm" and self.clip_layers == "penultimate":
            raise UserError(
                "clip_layers 'penultimate' is for bridge 'mlp2x_gelu'; bridge 'comm' takes 'all' or 'last'",
                "invalid_config",
            )
        return self

    def configs(self, image_size: int) -> dict[str, PretrainedConfig]:
        """The library's configs of the encoders there are, 'clip' and 'dinov2'. Those that say nothing of the pictures
        they were published for have positions for `image_size` pixels. `UserError` for keys that the library lacks."""
        from transformers import CLIPVisionConfig, Dinov2Config

        found = {}
        for name, config_class in (("clip", CLIPVisionConfig), ("dinov2", Dinov2Config)):
            if (keys := getattr(self, name)) is not None:
                _check_keys(f"vision.{name}", keys, config_class)
                found[name] = config_class(**{"image_size": image_size, **keys})
        return found


class RegionSettings(Settings):
    """The region encoder (see `regions.py`)."""

    kind: Literal["merged", "levels"] = Field(
        "merged",
        description="'merged' pools the vision branch's map; 'levels' is VisionLLM v2's, over the last three layers of "
        "CLIP, and needs vision.bridge 'mlp2x_gelu'",
    )
    channels: int = Field(16, gt=0, description="of the convolutions over image and mask; VisionLLM v2 has 256")
    sampling: Literal["centre", "corner"] = Field(
        "centre",
        description="where kind 'levels' reads a mask's pixel: at its centre, or at its top left corner with zeros "
        "outside the map, as the released VisionLLM v2 weights were trained",
    )

    @model_validator(mode="after")
    def _check(self) -> RegionSettings:
        if self.kind == "levels" and self.channels % 4:
            raise UserError("channels must be a multiple of 4 for kind 'levels'", "invalid_config")
        return self


class LumenSettings(Settings):
    """The light decoder (see `decoders/lumen.py`)."""

    hidden_size: int = Field(64, gt=0, description="channels of the aligned, per-prompt dense features")
    num_heads: int = Field(4, gt=0, description="heads of the aligner's attention")
    num_layers: int = Field(2, gt=0, description="two-way layers of the vision-language aligner")
    stride: Literal[4, 8, 16] = Field(8, description="stride of heatmap, boxes and kernels, in input pixels")
    mask_channels: int = Field(8, gt=0, description="mask feature channels a dynamic kernel reads")
    mask_weight: float = 1.0
    box_weight: float = 2.0
    heatmap_weight: float = 1.0
    match_weight: float = Field(0.5, ge=0, description="cross entropy of an object's places over the image's prompts")
    keypoint_weight: float = 1.0
    topk_assign: int = Field(9, gt=0, description="positive locations per object")
    pose_grid: int = Field(12, gt=0, description="cells per side of the grid sampled in a box for keypoints")
    nms_iou: float = Field(0.6, description="instances of one prompt that overlap more are merged")
    max_masks_per_object: int = Field(5, gt=0, description="positive locations of an object that train its mask")
    max_masks_per_image: int = Field(64, gt=0, description="the same, of all objects in an image")


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
