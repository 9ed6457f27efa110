"""The link head of decoders that look for objects and their keypoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lumen_ray.decoders.spec import DecoderSettings, TrunkShape
from lumen_ray.trunk.queries import LinkHead


class PoseLinkHead(nn.Module):
    """A `LinkHead` for object prompts and one for keypoint prompts (VisionLLM v2, arXiv 2406.08394; UniPose's two)."""

    vocabulary = LinkHead.vocabulary

    def __init__(self, llm_width: int, channels: int, reads_words: bool = False):
        super().__init__()
        self.objects = LinkHead(llm_width, channels, reads_words)
        self.keypoints = LinkHead(llm_width, channels, reads_words)

    def forward(self, states: Tensor, words: Tensor | None, parents: Tensor) -> Tensor:
        """states [P, N, llm_width] at the queries, words [P, llm_width] with `reads_words`, parents int64 [P], -1 for
        object prompts -> [P, channels]."""
        members = [torch.nonzero(chosen).flatten() for chosen in (parents < 0, parents >= 0)]
        parts = [
            head(states[own], None if words is None else words[own])
            for head, own in zip((self.objects, self.keypoints), members, strict=True)
        ]
        return torch.cat(parts)[torch.cat(members).argsort()]


def link_head(settings: DecoderSettings, shape: TrunkShape) -> PoseLinkHead:
    """The link head of a decoder of objects and their keypoints."""
    return PoseLinkHead(shape.llm_width, settings.link_width(shape.link_channels), shape.link_reads_words)
