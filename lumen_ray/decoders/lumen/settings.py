"""Settings of the light decoder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lumen_ray.decoders.spec import DecoderSettings


class LumenSettings(DecoderSettings):
    """The light decoder (see `decoders/lumen/decoder.py`)."""

    hidden_size: int = Field(64, gt=0, description="channels of the aligned, per-prompt dense features")
    num_heads: int = Field(4, gt=0, description="heads of the aligner's attention")
    num_layers: int = Field(2, gt=0, description="two-way layers of the vision-language aligner")
    stride: Literal[4, 8, 16] = Field(8, description="stride of heatmap, boxes and kernels, in input pixels")
    mask_channels: int = Field(8, gt=0, description="mask feature channels read by a dynamic kernel")
    mask_weight: float = 1.0
    box_weight: float = 2.0
    heatmap_weight: float = 1.0
    match_weight: float = Field(
        0.5, ge=0, description="weight of the cross entropy of an object's places over the image's prompts"
    )
    keypoint_weight: float = 1.0
    presence: bool = Field(
        False, description="predict whether a prompt's object is in the image; scores are multiplied by it"
    )
    presence_weight: float = Field(0.5, ge=0, description="weight of its cross entropy")
    presence_threshold: float = Field(
        0.02, ge=0, lt=1, description="prompts below it are answered by no object without a look at places; 0: none are"
    )
    topk_assign: int = Field(9, gt=0, description="positive places per object")
    pose_grid: int = Field(12, gt=0, description="cells per side of the grid sampled in a box for keypoints")
    nms_iou: float = Field(0.6, description="IoU threshold of NMS within a prompt")
    max_masks_per_object: int = Field(5, gt=0, description="maximum number of positives of an object with a mask loss")
    max_masks_per_image: int = Field(64, gt=0, description="maximum number of positives of an image with a mask loss")

    @property
    def tile(self) -> int:
        return self.stride

    def weight_semantics(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "presence": self.presence}
