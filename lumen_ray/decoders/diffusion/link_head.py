"""The link head of image decoders: query states -> the cross-attention input of a UNet.

VisionLLM v2 (arXiv 2406.08394), sec. 3.3: a 2-layer MLP projects the hidden states at the 64 queries to the width of
the UNet's cross attention; a small transformer with learned queries maps them to as many tokens as a text encoder
gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lumen_ray.decoders.diffusion.settings import DiffusionSettings
from lumen_ray.decoders.spec import TrunkShape


class DiffusionHead(nn.Module):
    """[P, N, llm_width] -> [P, num_tokens, width], prompt by prompt, without positions or masks.

    `width`: that of the UNet's cross attention, a multiple of `heads`. `layers`: of the encoder and of the decoder.

    With `vocabulary` (the LLM's vocabulary size) a linear path adds to every token a projection of the mean of the
    instruction's words, in a separate embedding table. A freshly initialised mapper passes less than a thousandth of
    the difference between two instructions, since its learned queries dominate, and the embeddings of a small LLM
    hardly separate colours; a UNet without a useful condition learns to ignore it.
    """

    vocabulary: nn.Embedding | None
    words: nn.Sequential | None

    def __init__(
        self,
        llm_width: int,
        width: int,
        num_tokens: int = 77,
        heads: int = 8,
        layers: int = 1,
        vocabulary: int = 0,
    ):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(llm_width, width), nn.GELU(), nn.Linear(width, width))
        kind: dict[str, Any] = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, **kind),
            layers,
            nn.LayerNorm(width),
            enable_nested_tensor=False,  # not supported with norm_first; avoids a warning
        )
        self.mapper = nn.Transformer(
            d_model=width, nhead=heads, num_decoder_layers=layers, custom_encoder=encoder, **kind
        )
        self.queries = nn.Parameter(torch.randn(num_tokens, width))
        self.vocabulary = self.words = None
        if vocabulary:
            self.vocabulary = nn.Embedding(vocabulary, llm_width)
            self.words = nn.Sequential(nn.LayerNorm(llm_width), nn.Linear(llm_width, num_tokens * width))

    def forward(self, states: Tensor, words: Tensor | None = None, parents: Tensor | None = None) -> Tensor:
        """states [P, N, llm_width] at the queries, without the routing token; words [P, llm_width], the mean of
        `vocabulary` over each instruction. `parents` is unused."""
        tokens = self.mapper(self.proj(states), self.queries.expand(len(states), -1, -1))
        return tokens if self.words is None else tokens + self.words(words).view_as(tokens)


def link_head(settings: DiffusionSettings, shape: TrunkShape) -> DiffusionHead:
    """Builds the link head of an image decoder."""
    vocabulary = shape.vocab_size if shape.link_reads_words else 0
    return DiffusionHead(
        shape.llm_width,
        settings.unet["cross_attention_dim"],
        settings.num_tokens,
        settings.mapper_heads,
        settings.mapper_layers,
        vocabulary,
    )
