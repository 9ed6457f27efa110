"""Settings of the trunk: vision branch, region encoder, LLM and prompt layout."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lumen_ray.config import Settings
from lumen_ray.decoders.spec import TrunkShape
from lumen_ray.errors import UserError, suggest
from lumen_ray.structures import Size

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, Dinov2Config, PretrainedConfig


#: keys of published config files that `transformers` reads although its classes have no such field
_LEGACY_KEYS = ("rope_theta", "rope_scaling")


def _check_keys(where: str, keys: dict[str, Any], config_class: type[PretrainedConfig]) -> None:
    """Raises `UserError` for an unknown key: `transformers` ignores it silently, so a typo would change the model."""
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
        description="how encoder outputs become image tokens: 'comm' merges layers of both encoders; 'mlp2x_gelu' is "
        "the 2-layer MLP of LLaVA and VisionLLM v2 on one layer of CLIP",
    )
    clip_layers: Literal["all", "last", "penultimate"] = Field(
        "all", description="CLIP layers that are merged; with bridge 'mlp2x_gelu' the layer that is used"
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

    def configs(self, image_size: int) -> dict[str, CLIPVisionConfig | Dinov2Config]:
        """The `transformers` configs of the encoders that are switched on, by 'clip' and 'dinov2'."""
        configs = {"clip": self.clip_config(image_size), "dinov2": self.dinov2_config(image_size)}
        return {name: config for name, config in configs.items() if config is not None}

    def patch_sizes(self, image_size: int) -> dict[str, int]:
        """Patch size in pixels by encoder. Raises `UserError` if one is not an integer."""
        sizes = {}
        for name, config in self.configs(image_size).items():
            if not isinstance(config.patch_size, int):
                raise UserError(
                    f"vision.{name}.patch_size must be an integer, got {config.patch_size}", "invalid_config"
                )
            sizes[name] = config.patch_size
        return sizes

    def patch_size(self, image_size: int) -> int:
        """Patch size in pixels, the same for both encoders, which share a grid."""
        return next(iter(self.patch_sizes(image_size).values()))

    def clip_config(self, image_size: int) -> CLIPVisionConfig | None:
        """The config of CLIP; positions are for `image_size` pixels unless `clip` sets it. None if it is switched off.

        Raises `UserError` for keys that `transformers` lacks.
        """
        from transformers import CLIPVisionConfig

        if self.clip is None:
            return None
        _check_keys("vision.clip", self.clip, CLIPVisionConfig)
        return CLIPVisionConfig(**{"image_size": image_size, **self.clip})

    def dinov2_config(self, image_size: int) -> Dinov2Config | None:
        """The config of DINOv2, as `clip_config`."""
        from transformers import Dinov2Config

        if self.dinov2 is None:
            return None
        _check_keys("vision.dinov2", self.dinov2, Dinov2Config)
        return Dinov2Config(**{"image_size": image_size, **self.dinov2})


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
        description="where kind 'levels' samples the map for a pixel of the mask: at the pixel's centre, or at its top "
        "left corner with zeros outside the map, as the released VisionLLM v2 weights were trained",
    )

    @model_validator(mode="after")
    def _check(self) -> RegionSettings:
        if self.kind == "levels" and self.channels % 4:
            raise UserError("channels must be a multiple of 4 for kind 'levels'", "invalid_config")
        return self


class ImageAdapterSettings(Settings):
    """Low-rank adapters of the LLM that act in rows with an image only (see `image_adapters.py`)."""

    rank: int = Field(8, gt=0, description="rank of the adapters' matrices")
    alpha: float = Field(16.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("*_proj",),
        min_length=1,
        description="names of linear layers in the LLM's blocks that get adapters; * is a wildcard",
    )


class TrunkSettings(Settings):
    """Vision branch, region encoder, LLM, prompt layout and super-link queries."""

    name: str = Field(description="preset name; kept in checkpoints and checked when they are loaded")
    image_size: int = Field(
        gt=0,
        description="side in pixels of the square input of the encoders' position embeddings, and of the model input "
        "if a recipe has no buckets",
    )
    vision: VisionSettings
    regions: RegionSettings = RegionSettings()
    llm: dict[str, Any] = Field(description="`model_type` and the keys of its transformers config class")
    prefix_attention: Literal["causal", "full"] = Field(
        "causal", description="attention among image tokens; 'causal' for LLMs that were pretrained so"
    )
    prompt_layout: Literal["branches", "sequential"] = Field(
        "branches",
        description="'branches': each prompt attends to the image and itself; 'sequential': all prompts of an image in "
        "one causal string, as the released VisionLLM v2 weights were trained",
    )
    lead_tokens: tuple[int, ...] = Field(
        (),
        description="token ids before the image: begin-of-sequence token, system text, beginning of the first question",
    )
    published_tokens: int = Field(
        0,
        ge=0,
        description="tokens that a published LLM knew, the first rows of its embedding; 0: the LLM is not published. "
        "Where it is frozen or trained by adapters, only the rows after them learn",
    )
    image_adapters: ImageAdapterSettings | None = Field(
        None,
        description="adapters of the LLM in rows with an image. Its own weights are then never trained, except the "
        "rows of new tokens, so that text alone is answered as before",
    )
    dense_channels: int = Field(64, gt=0, description="channels of the shared dense features")
    stem_channels: int = Field(32, gt=0, description="channels of the convolutional stem at stride 4")
    tokens_read_stem: bool = Field(
        False, description="image tokens also read the convolutional stem; for encoders trained from scratch"
    )
    links_see_image: bool = Field(
        True,
        description="false: prompts for classes, noun phrases and keypoints read their own words only, so their links "
        "are computed once for all images; referring expressions, region prompts and texts see the image",
    )
    link_channels: int = Field(256, gt=0, description="width of the light decoder's link embeddings")
    link_reads_words: bool = Field(
        False, description="links also read the instruction's words; for an LLM trained from scratch"
    )
    vocab_size: int = Field(512, gt=0, description="size of a tokenizer trained from scratch, special tokens included")
    pose_queries: bool = Field(
        False, description="keypoint prompts have separate super-link queries, as in the released VisionLLM v2"
    )

    def shape(self, llm_width: int, vocab_size: int) -> TrunkShape:
        """The widths that decoders and link heads are built for."""
        return TrunkShape(llm_width, vocab_size, self.dense_channels, self.link_channels, self.link_reads_words)

    def llm_config(self, **more: Any) -> PretrainedConfig:
        """The `transformers` config of the LLM, with `more` keys."""
        from transformers import AutoConfig

        keys = dict(self.llm)
        return AutoConfig.for_model(keys.pop("model_type"), **keys, **more)

    @property
    def token_side(self) -> int:
        """Input pixels per side of one image token."""
        return self.vision.patch_size(self.image_size) * self.vision.token_merge

    def image_tokens(self, size: Size) -> int:
        """The number of LLM tokens of an input of (height, width) pixels, lead tokens included."""
        return (size[0] // self.token_side) * (size[1] // self.token_side) + len(self.lead_tokens)

    @model_validator(mode="after")
    def _check_llm(self) -> TrunkSettings:
        from transformers import CONFIG_MAPPING

        if "model_type" not in self.llm:
            raise UserError("llm: 'model_type' is required, e.g. llama or qwen3", "invalid_config")
        if (kind := self.llm["model_type"]) not in CONFIG_MAPPING:
            raise UserError(
                f"unknown llm.model_type '{kind}';{suggest(str(kind), CONFIG_MAPPING.keys())} give a model type of "
                "transformers, e.g. llama or qwen3",
                "invalid_config",
            )
        keys = {key: value for key, value in self.llm.items() if key != "model_type"}
        _check_keys("llm", keys, CONFIG_MAPPING[kind])
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> TrunkSettings:
        if self.regions.kind == "levels" and self.vision.bridge != "mlp2x_gelu":
            raise UserError("regions.kind 'levels' needs vision.bridge 'mlp2x_gelu'", "invalid_config")
        if self.vision.bridge != "comm" and self.tokens_read_stem:
            raise UserError("tokens_read_stem needs vision.bridge 'comm'", "invalid_config")
        if self.prompt_layout == "sequential" and self.prefix_attention != "causal":
            raise UserError("prompt_layout 'sequential' needs prefix_attention 'causal'", "invalid_config")
        if self.prompt_layout == "sequential" and not self.links_see_image:
            raise UserError("links_see_image: false needs prompt_layout 'branches'", "invalid_config")
        if self.prompt_layout == "sequential" and self.link_reads_words:
            raise UserError("link_reads_words needs prompt_layout 'branches'", "invalid_config")
        return self
