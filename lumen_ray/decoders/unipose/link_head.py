"""The link head of decoders with object and keypoint prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lumen_ray.decoders.spec import DecoderSettings, TrunkShape
from lumen_ray.trunk.queries import LinkHead


class PoseLinkHead(nn.Module):
    """A `LinkHead` for object prompts and one for keypoint prompts, as in VisionLLM v2 (arXiv 2406.08394, sec. 3.3)."""

    vocabulary: nn.Embedding | None = None  # words are read in the LLM's embeddings

    def __init__(self, llm_width: int, channels: int, reads_words: bool = False):
        super().__init__()
        self.objects = LinkHead(llm_width, channels, reads_words)
        self.keypoints = LinkHead(llm_width, channels, reads_words)

    def forward(self, states: Tensor, words: Tensor | None, parents: Tensor) -> Tensor:
        """states [P, N, llm_width] at the queries, words [P, llm_width] with `reads_words`, parents int64 [P], -1 for
        object prompts -> [P, channels]."""
        members = [torch.nonzero(chosen).flatten() for chosen in (parents < 0, parents >= 0)]
        embeddings = [
            head(states[rows], None if words is None else words[rows])
            for head, rows in zip((self.objects, self.keypoints), members, strict=True)
        ]
        return torch.cat(embeddings)[torch.cat(members).argsort()]


def link_head(settings: DecoderSettings, shape: TrunkShape) -> PoseLinkHead:
    """Builds the link head of a decoder with object and keypoint prompts."""
    return PoseLinkHead(shape.llm_width, settings.link_width(shape.link_channels), shape.link_reads_words)
