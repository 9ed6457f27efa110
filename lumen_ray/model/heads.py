"""Link heads: what each decoder's part of the super link passes through on the trunk's side.

What crosses the wire is decoder-sized: [P, C] for perception, [P, T, C] for pictures.
"""

from __future__ import annotations

from torch import nn

from lumen_ray.decoders.diffusion.link_head import DiffusionHead
from lumen_ray.decoders.diffusion.settings import DiffusionSettings
from lumen_ray.decoders.unipose.link_head import PoseLinkHead
from lumen_ray.model.settings import ModelSettings
from lumen_ray.trunk.queries import LinkHead


def link_head(decoder: str, settings: ModelSettings, llm_width: int, vocab_size: int) -> nn.Module:
    """The head of a decoder: (states [P, N, llm_width], words [P, llm_width] or None, parents [P]) -> embeddings.

    Words are means of the LLM's embeddings, or where a head has a `vocabulary`, of those."""
    own = getattr(settings, decoder)
    if isinstance(own, DiffusionSettings):
        width = own.unet["cross_attention_dim"]
        vocabulary = vocab_size if settings.link_reads_words else 0
        return DiffusionHead(llm_width, width, own.num_tokens, own.mapper_heads, own.mapper_layers, vocabulary)
    kind = PoseLinkHead if decoder == "unipose" else LinkHead
    return kind(llm_width, settings.link_width(decoder), settings.link_reads_words)
