"""Settings of the UniPose decoder."""

from __future__ import annotations

from pydantic import Field, model_validator

from lumen_ray.decoders.dino.settings import _TWICE, DinoLossSettings
from lumen_ray.errors import UserError


class UniPoseSettings(DinoLossSettings):
    """The pose expert (see `decoders/unipose/decoder.py`; UniPose, arXiv 2310.08530)."""

    inverse_sigmoid_eps: float = Field(
        1e-3, gt=0, lt=0.5, description="clamp of reference coordinates, away from 0 and 1"
    )
    box_layers: int = Field(2, gt=0, description="decoder layers that detect objects before keypoint queries join")
    num_instances: int = Field(
        50, gt=0, description="maximum number of instances of all prompts of a group with keypoints"
    )
    size_tables: tuple[int, ...] = Field(
        (), description="lengths of the tables of keypoint sizes by slot; [17, 51] for published weights"
    )
    keypoint_cost: float = Field(10.0, ge=0, description="matching: weight of L1 between keypoints")
    oks_cost: float = Field(4.0, ge=0, description="matching: weight of 1 - OKS")
    keypoint_weight: float = Field(10.0, ge=0, description="loss: weight of L1 between keypoints")
    oks_weight: float = Field(4.0, ge=0, description="loss: weight of 1 - OKS")
    visible_weight: float = Field(1.0, ge=0, description="loss: weight of the visibility's cross entropy")
    look_forward_twice: bool = Field(True, description=_TWICE)

    @model_validator(mode="after")
    def _check_layers(self) -> UniPoseSettings:
        if self.decoder_layers <= self.box_layers:
            raise UserError(
                f"decoder_layers {self.decoder_layers} must be more than box_layers {self.box_layers}: the layers "
                "after those predict keypoints",
                "invalid_config",
            )
        return self
