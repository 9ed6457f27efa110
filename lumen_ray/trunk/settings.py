"""Settings of the trunk: vision branch and region encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError, suggest

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
