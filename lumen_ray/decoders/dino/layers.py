"""The layers of Grounding DINO's transformer (arXiv 2303.05499, sec. 3.1 and 3.3) with the weights of `transformers`,
in fewer and fused operations.

Legend: G groups, T links of a group, S places of all levels, Q queries, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino import modeling_grounding_dino as hf

from lumen_ray.decoders.dino.deformable import DeformableAttention

if TYPE_CHECKING:
    from lumen_ray.decoders.dino.memory import Memory


class FusedAttention(hf.GroundingDinoMultiheadAttention):
    """The same attention by torch's fused kernels, which store no Q x Q weights per head.

    A mask with more rows than groups splits the queries and keys of each group into as many blocks of equal size, which
    do not attend to each other."""

    def forward(  # type: ignore[override]  # the library returns (output, None), too, but annotates tuple[Tensor]
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, None]:
        rows = len(queries) if attention_mask is None else max(len(queries), len(attention_mask))

        def heads(x: Tensor) -> Tensor:
            return x.reshape(rows, -1, self.num_attention_heads, self.attention_head_size).transpose(1, 2)

        query, key, value = heads(self.query(queries)), heads(self.key(keys)), heads(self.value(values))
        read = fused(query, key, value, attention_mask, self.dropout.p if self.training else 0.0)
        return self.out_proj(read.transpose(1, 2).reshape_as(queries)), None


class FusedFusion(hf.GroundingDinoBiMultiHeadAttention):
    """Cross-attention between pixels and links in both directions by torch's fused kernels, which store no S x T
    weights per head. Masks are biases, [G, 1, 1, S] and [G, 1, 1, T]."""

    def forward(  # type: ignore[override]  # the library's weights, here None, are read by nobody
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, None], tuple[Tensor, None]]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        vision, text = heads(self.vision_proj(vision_features)), heads(self.text_proj(text_features))
        of_vision, of_text = (
            heads(self.values_vision_proj(vision_features)),
            heads(self.values_text_proj(text_features)),
        )
        dropout = self.dropout if self.training else 0.0
        by_vision = fused(vision, text, of_text, text_attention_mask, dropout).transpose(1, 2).flatten(2)
        by_text = fused(text, vision, of_vision, vision_attention_mask, dropout).transpose(1, 2).flatten(2)
        return (self.out_vision_proj(by_vision), None), (self.out_text_proj(by_text), None)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention of [rows, heads, Q, C / heads]; `mask` is a bias."""
    mask = mask if mask is None else mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class EncoderLayer(hf.GroundingDinoEncoderLayer):
    """The layer of `transformers`, with its weights, on the fused attentions above."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__(config)
        heads = config.encoder_attention_heads
        self.text_enhancer_layer.self_attn = FusedAttention(config, heads // 2)
        self.fusion_layer.attn = FusedFusion(config)
        self.deformable_layer.self_attn = DeformableAttention(config, heads, config.encoder_n_points)

    def forward(  # type: ignore[override]  # run by `DinoTrunk.encode`, not by the encoder of `transformers`
        self,
        vision: Tensor,
        links: Tensor,
        memory: Memory,
        places: Tensor,
        reference: Tensor,
        positions: Tensor,
        blocked: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Fuses vision [G, S, C] and links [G, T, C] of `memory`, then applies self-attention to each. `places`
        [G, S, C] and `positions` [G, T, C]: position embeddings; `reference` [G, S, levels, 2]: reference points of
        pixels; `blocked`: a bias, [G, 1, T, T]."""
        (vision, _), (links, _) = self.fusion_layer(vision, links, memory.vision_mask, memory.link_mask)
        links, _ = self.text_enhancer_layer(links, blocked, positions)
        vision, _ = self.deformable_layer(
            vision, memory.vision_valid, places, reference, spatial_shapes_list=memory.shapes
        )
        return vision, links


class Encoder(nn.Module):
    """The layers of `hf.GroundingDinoEncoder` under the same names; run by `DinoTrunk.encode`."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
