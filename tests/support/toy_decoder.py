"""The smallest decoder of another package: one file, and the entry point `toy = support.toy_decoder:SPEC`.

It predicts one box per prompt from the mean of the dense features and the prompt's link.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lumen_ray.decoders.base import Decoder, LossTerm, PredictSettings, PromptSpec
from lumen_ray.decoders.common.flops import DecoderWork, is_trainable, products
from lumen_ray.decoders.spec import DecoderSettings, DecoderSpec, TrunkShape
from lumen_ray.structures import Boxes, Prediction
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import MASK_STRIDE, Frame, PerceptionTargets


class ToySettings(DecoderSettings):
    hidden_size: int = Field(16, gt=0, description="width of the hidden layer")


def count_flops(decoder: ToyDecoder, work: DecoderWork) -> float:
    """FLOPs of a training step, forward and backward."""
    trained = is_trainable(decoder)
    return products(decoder, lambda _: len(work.link)) * (1 + (work.needs_input_grad or trained) + trained)


SPEC = DecoderSpec(
    name="toy",
    family="perception",
    tasks=("detect", "count"),
    reads="dense",
    losses={"toy_present": "objects", "toy_box": "objects"},
    settings=ToySettings,
    decoder="support.toy_decoder:ToyDecoder",
    link_head="lumen_ray.trunk.queries:perception_head",
    flops="support.toy_decoder:count_flops",
    description="one box per prompt",
)


@dataclass
class ToyRaw:
    present: Tensor  # float32 [P], logits
    boxes: Tensor  # float32 [P, 4] xyxy, input pixels
    image_index: Tensor  # int64 [P]


class ToyDecoder(Decoder):
    spec = SPEC

    @classmethod
    def build(cls, settings: ToySettings, shape: TrunkShape) -> ToyDecoder:
        return cls(settings, shape.dense_channels, settings.link_width(shape.link_channels))

    def __init__(self, settings: ToySettings, dense_channels: int, link_channels: int):
        super().__init__()
        self.hidden = nn.Linear(dense_channels + link_channels, settings.hidden_size)
        self.output = nn.Linear(settings.hidden_size, 5)

    def forward(self, link: SuperLink, dense: Tensor) -> ToyRaw:
        """link of P prompts, dense features [B, C, H/4, W/4]."""
        pooled = dense.mean((2, 3))[link.image_index]
        out = self.output(F.relu(self.hidden(torch.cat([pooled, link.embeddings], -1))))
        height, width = (MASK_STRIDE * side for side in dense.shape[-2:])
        corners = out[:, 1:].sigmoid() * out.new_tensor([width, height, width, height])
        low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
        return ToyRaw(out[:, 0], torch.cat([low, high], -1), link.image_index)

    def loss(self, raw: ToyRaw, targets: PerceptionTargets) -> dict[str, LossTerm]:
        usable = targets.valid & ~targets.crowd
        present = usable.any(1)
        bce = F.binary_cross_entropy_with_logits(raw.present, present.float(), reduction="none")
        first = usable.float().argmax(1)
        wanted = targets.boxes.gather(1, first[:, None, None].expand(-1, 1, 4))[:, 0]
        apart = F.l1_loss(raw.boxes, wanted, reduction="none").mean(1) * present
        count = present.sum().float().clamp_min(1)
        return {"toy_present": LossTerm(bce.sum(), count), "toy_box": LossTerm(apart.sum(), count)}

    def predict(
        self, raw: ToyRaw, frames: list[Frame], prompts: list[PromptSpec | None], settings: PredictSettings
    ) -> list[Prediction | None]:
        found: list[Prediction | None] = []
        for p, prompt in enumerate(prompts):
            frame, box, score = frames[int(raw.image_index[p])], raw.boxes[p], raw.present[p].sigmoid()
            boxes = Boxes((box[None] / frame.scale).cpu().numpy(), frame.size).clip()
            one = None if prompt is None else Prediction(prompt.phrase, boxes, score[None].cpu().numpy())
            found.append(one and one.above(settings.score_threshold))
        return found
