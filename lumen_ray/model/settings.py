"""Settings of a model: what `configs/models/*.yaml` says. Widths of the encoders and the LLM are passed to their
`transformers` config classes unchanged, so any size of the same classes can be described."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError


class VisionSettings(Settings):
    """COMM (arXiv 2310.08825, sec. 3): two encoders, merged over layers. Either may be null; not both."""

    clip: dict[str, Any] | None = Field(None, description="keys of transformers.CLIPVisionConfig; null switches it off")
    dinov2: dict[str, Any] | None = Field(None, description="keys of transformers.Dinov2Config; null switches it off")
    clip_layers: Literal["all", "last"] = Field("all", description="CLIP layers that are merged")
    dinov2_layers: Literal["all", "last_quarter", "last"] = Field("last_quarter", description="DINOv2 layers merged")
    token_merge: int = Field(1, gt=0, description="image tokens per side that become one LLM token (pixel shuffle)")
    mlp_ratio: int = Field(4, description="hidden width of DINOv2's 2-layer MLP, relative to its output")

    @model_validator(mode="after")
    def _one_encoder(self) -> VisionSettings:
        if self.clip is None and self.dinov2 is None:
            raise UserError("vision: at least one of 'clip' and 'dinov2' must be set", "invalid_config")
        return self


class LumenSettings(Settings):
    """The light decoder (see `decoders/lumen.py`)."""

    hidden_size: int = Field(64, gt=0, description="channels of the aligned, per-prompt dense features")
    num_heads: int = Field(4, gt=0, description="heads of the aligner's attention")
    num_layers: int = Field(2, gt=0, description="two-way layers of the vision-language aligner")
    stride: int = Field(8, description="stride of heatmap, boxes and kernels, in input pixels")
    mask_channels: int = Field(8, gt=0, description="mask feature channels a dynamic kernel reads")
    mask_weight: float = 1.0
    box_weight: float = 2.0
    heatmap_weight: float = 1.0
    keypoint_weight: float = 1.0
    topk_assign: int = Field(9, gt=0, description="positive locations per object")
    pose_grid: int = Field(12, gt=0, description="cells per side of the grid sampled in a box for keypoints")
    nms_iou: float = Field(0.6, description="instances of one prompt that overlap more are merged")
    max_masks_per_batch: int = Field(96, description="positives whose masks are trained in one step")


class ModelSettings(Settings):
    name: str = Field(description="preset name; kept in checkpoints and checked when they are loaded")
    image_size: int = Field(gt=0, description="side of the square input in pixels; images are scaled and padded to it")
    vision: VisionSettings
    llm: dict[str, Any] = Field(description="`model_type` and the keys of its transformers config class")
    prefix_attention: Literal["causal", "full"] = Field(
        "causal", description="attention among image tokens; 'causal' for LLMs that were pretrained so"
    )
    dense_channels: int = Field(64, gt=0, description="channels of the shared dense features")
    stem_channels: int = Field(32, gt=0, description="channels of the convolutional stem at stride 4")
    link_channels: int = Field(256, gt=0, description="width of a perception link embedding")
    vocab_size: int = Field(512, gt=0, description="size of a tokenizer trained from scratch, special tokens included")
    lumen: LumenSettings = LumenSettings()
