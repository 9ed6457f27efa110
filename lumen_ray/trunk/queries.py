"""The super link: learnable queries behind a routing token, and the head that projects them to the decoder's width.

VisionLLM v2 (arXiv 2406.08394), sec. 3.3: when the LLM emits a routing token such as [DET], N learned query embeddings
are appended; their last hidden states, not text, condition the decoder, and its gradients flow back into the LLM.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lumen_ray.decoders.spec import DecoderSettings, TrunkShape
from lumen_ray.tasks import LINK_FAMILIES


class SuperLinkQueries(nn.Module):
    """The learned query embeddings, one set per decoder family: [num_queries, llm_width]."""

    def __init__(
        self, llm_width: int, std: float, families: Iterable[str] = ("perception",), pose_queries: bool = False
    ):
        """`std`: that of the LLM's token embeddings, so that queries start at the same scale. `pose_queries`: adds a
        separate set for keypoint prompts."""
        super().__init__()
        numbers = {name: LINK_FAMILIES[name].num_queries for name in families}
        if pose_queries:
            numbers["pose"] = numbers["perception"]
        self.queries = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(number, llm_width) * std) for name, number in numbers.items()}
        )

    def of(self, family: str, posed: bool) -> list[nn.Parameter]:
        """The query sets of a family's prompts; `posed`: including that of keypoint prompts."""
        names = (family, "pose") if family == "perception" and posed else (family,)
        return [self.queries[name] for name in names if name in self.queries]

    def forward(self, family: str, parents: Tensor) -> Tensor:
        """[P, num_queries, llm_width] for prompts with these `parents` (int64 [P], -1 except for keypoint prompts)."""
        queries = self.queries[family].repeat(len(parents), 1, 1)
        if family != "perception" or "pose" not in self.queries:
            return queries
        return torch.where((parents >= 0)[:, None, None], self.queries["pose"], queries)


class LinkHead(nn.Module):
    """3-layer MLP and a mean over the queries: [P, N, llm_width] -> [P, channels] (perception families).

    With `reads_words` a linear path adds the mean embedding of the branch's tokens before the queries. In an LLM
    trained from scratch less than a thousandth of the query states differs between class names at first; classes would
    collapse before a decoder could use the difference.
    """

    vocabulary: nn.Embedding | None = None  # words are read in the LLM's embeddings
    words: nn.Sequential | None

    def __init__(self, llm_width: int, channels: int, reads_words: bool = False):
        super().__init__()
        layers = [nn.Linear(width, channels) for width in (llm_width, channels, channels)]
        self.mlp = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        # The default initialisation shrinks the differences between prompts at every layer until only the biases, equal
        # for all prompts, are left after a decoder's normalisation.
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.words = None
        if reads_words:  # the words dominate at first
            self.words = nn.Sequential(nn.LayerNorm(llm_width), nn.Linear(llm_width, channels))
            nn.init.normal_(layers[-1].weight, std=0.1 * channels**-0.5)

    def forward(self, states: Tensor, words: Tensor | None = None, parents: Tensor | None = None) -> Tensor:
        """states [P, N, llm_width] at the queries, words [P, llm_width] with `reads_words` -> [P, channels].

        `parents` (int64 [P]) is for heads that treat keypoint prompts differently from object prompts.
        """
        link = self.mlp(states).mean(dim=1)
        return link if self.words is None else link + self.words(words)


def mean_words(embeds: Tensor, branch_ids: Tensor, queries: Tensor, num_branches: int) -> Tensor:
    """Mean embedding of every branch's tokens except its queries: embeds [B, T, W], branch_ids [B, T] (-1: padding),
    queries [..., 2] (image, token) -> [num_branches, W]."""
    word = branch_ids >= 0
    word[queries[..., 0], queries[..., 1]] = False
    owner = branch_ids[word]
    sums = embeds.new_zeros(num_branches, embeds.shape[-1]).index_add(0, owner, embeds[word])
    return sums / owner.bincount(minlength=num_branches).clamp_min(1).unsqueeze(1)


def perception_head(settings: DecoderSettings, shape: TrunkShape) -> LinkHead:
    """Builds the link head of a perception decoder."""
    return LinkHead(shape.llm_width, settings.link_width(shape.link_channels), shape.link_reads_words)
