"""The super link: learnable queries behind a routing token, and the head that makes them decoder-sized.

VisionLLM v2 (arXiv 2406.08394), sec. 3.3: when the LLM emits a routing token such as [DET], N learned query
embeddings are appended; their last hidden states, not text, condition the decoder, and its gradients flow back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lumen_ray.tasks import LINK_FAMILIES


@dataclass
class SuperLink:
    """What leaves the trunk for one family of decoders: one vector per prompt of a batch.

    `embeddings`: float32 [P, C]. `image_index`: int64 [P], the image of the batch each prompt is about.
    `parent`: int64 [P], -1, or for a keypoint prompt the index of its object's prompt.
    """

    family: str
    embeddings: Tensor
    image_index: Tensor
    parent: Tensor

    def __len__(self) -> int:
        return len(self.image_index)


class SuperLinkQueries(nn.Module):
    """The learned query embeddings, one set per decoder family: [num_queries, llm_width]."""

    def __init__(self, llm_width: int, std: float):
        """`std` is that of the LLM's own token embeddings, so that the queries enter on the same scale."""
        super().__init__()
        self.queries = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(f.num_queries, llm_width) * std) for name, f in LINK_FAMILIES.items()}
        )

    def forward(self, family: str) -> Tensor:
        return self.queries[family]


class LinkHead(nn.Module):
    """3-layer MLP and a mean over the queries: [P, N, llm_width] -> [P, channels] (perception families)."""

    def __init__(self, llm_width: int, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(llm_width, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )
        # The default initialisation shrinks what differs between prompts at every layer until the biases, which do
        # not differ, are all that a decoder's normalisation sees.
        for layer in self.mlp[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.mlp(states).mean(dim=1)
