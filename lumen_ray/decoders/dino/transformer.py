"""Grounding DINO's transformer with link embeddings in place of its text branch (arXiv 2303.05499).

Built from the modules of `transformers`. Flattening, two-stage selection and the decoder's loop are implemented here,
because the library's run BERT and assume a fixed number of queries. Shared by the decoders of the family.

The backbone reads each image without its padding, so that features do not depend on the size of the batch's input.

Legend: B images, G groups (prompts processed jointly, each group about one image), T links of a group, S places of all
levels, Q queries, C channels. Boxes inside are cxcywh in 0..1 of the image without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GroundingDinoConfig, SwinConfig
from transformers.modeling_outputs import BackboneOutput
from transformers.models.grounding_dino import modeling_grounding_dino as hf
from transformers.models.swin.modeling_swin import SwinBackbone

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.common.boxes import inverse_sigmoid
from lumen_ray.decoders.dino.deformable import DeformableAttention
from lumen_ray.decoders.dino.layers import Encoder, FusedAttention
from lumen_ray.decoders.dino.memory import Levels, Memory
from lumen_ray.decoders.dino.settings import DinoSettings
from lumen_ray.input_size import by_size
from lumen_ray.structures import Size
from lumen_ray.targets import MASK_STRIDE
from lumen_ray.trunk.dense import DownBlock

STRIDES = (8, 16, 32, 64)  # of the levels the transformer reads
GROUPS = 32  # of every GroupNorm
MIN_PROPOSAL, MAX_PROPOSAL = 0.01, 0.99  # places whose proposal leaves this range are excluded
PROPOSAL_SIZE = 0.05  # side of a proposal on the finest level, relative to the image
PLACE_TEMPERATURE, TEMPERATURE = 20, 10_000  # of the sine embeddings of places, and of queries and links


def cells(size: Size, stride: int) -> Size:
    """(rows, columns) of the feature map of an image of `size` (height, width), rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Gathers rows of values [G, S, C] at index int64 [G, Q] -> [G, Q, C]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


@dataclass
class Proposals:
    """The encoder's proposal at every place. Excluded places have boxes of +inf and are not `valid`."""

    features: Tensor  # [G, S, C]
    start: Tensor  # float32 [G, S, 4]: logits of the places' initial boxes
    valid: Tensor  # bool [G, S]


def sines(values: Tensor, channels: int, temperature: float = TEMPERATURE) -> Tensor:
    """[..., N] -> [..., N * channels]: sine and cosine of each value, interleaved, of increasing periods (arXiv
    1706.03762, sec. 3.5)."""
    steps = torch.arange(0, channels, 2, device=values.device) / channels
    angle = values[..., None] * (2 * math.pi / temperature**steps)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that also handles groups of a single value, as on the coarsest level of a small image in a narrow
    model: they are normalised to exactly 0, where rounding errors would be amplified by 1 / sqrt(eps)."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() == self.num_groups:
            return x * 0 * self.weight[:, None, None] + self.bias[:, None, None]
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def library_config(s: DinoSettings) -> GroundingDinoConfig:
    """The config of the same model in `transformers`."""
    swin = SwinConfig(**{**s.backbone, "out_features": ["stage1", "stage2", "stage3", "stage4"]})
    return GroundingDinoConfig(
        backbone_config=swin,
        d_model=s.hidden_size,
        num_queries=s.num_queries,
        num_feature_levels=len(STRIDES),
        encoder_layers=s.encoder_layers,
        decoder_layers=s.decoder_layers,
        encoder_ffn_dim=s.encoder_ffn,
        decoder_ffn_dim=s.decoder_ffn,
        encoder_attention_heads=s.num_heads,
        decoder_attention_heads=s.num_heads,
        encoder_n_points=s.encoder_points,
        decoder_n_points=s.decoder_points,
        dropout=s.dropout,
        fusion_droppath=s.fusion_drop_path,
    )


def box_head(hidden_size: int, outputs: int = 4) -> hf.GroundingDinoMLPPredictionHead:
    """A 3-layer MLP whose output is 0 at initialisation, so that it predicts no change."""
    head = hf.GroundingDinoMLPPredictionHead(hidden_size, hidden_size, outputs, 3)
    nn.init.zeros_(last_layer(head).weight)
    nn.init.zeros_(last_layer(head).bias)
    return head


def last_layer(head: hf.GroundingDinoMLPPredictionHead) -> nn.Linear:
    """The output layer of a box head."""
    return cast(nn.Linear, head.layers[-1])


class DensePyramid(nn.Module):
    """The trunk's dense features, as a backbone's maps at strides 4, 8, 16 and 32."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.channels = [channels, *[hidden_size] * 3]
        self.down = nn.ModuleList(DownBlock(*widths) for widths in pairwise(self.channels))

    def forward(self, dense: Tensor) -> BackboneOutput:
        """dense [B, channels, H/4, W/4]"""
        maps = [dense]
        for block in self.down:
            maps.append(block(maps[-1]))
        return BackboneOutput(feature_maps=cast(Any, tuple(maps)))  # the library annotates a tuple of one


class DinoTrunk(nn.Module):
    """Backbone, encoder with link fusion, two-stage selection and decoder layers.

    Weights have the names of `transformers.GroundingDinoModel`, without its text branch.
    """

    backbone: Any  # a SwinBackbone or `DensePyramid`

    def __init__(self, settings: DinoSettings, dense_channels: int = 0):
        """`dense_channels`: of the trunk's dense features, for settings that read them."""
        super().__init__()
        self.settings = settings
        config, c = library_config(settings), settings.hidden_size
        if settings.features == "trunk":
            self.backbone = DensePyramid(dense_channels, c)
        else:
            self.backbone = SwinBackbone(cast(SwinConfig, config.backbone_config))
            self.backbone.swin.layernorm = nn.Identity()  # its output is unused
        channels = self.backbone.channels
        self.stride4_channels = channels[0]
        self.input_proj_vision = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, c, 1), GroupNorm(c)) for width in channels[1:]
        )
        coarsest = nn.Conv2d(channels[-1], c, 3, stride=2, padding=1)
        self.input_proj_vision.append(nn.Sequential(coarsest, GroupNorm(c)))
        self.level_embed = nn.Parameter(torch.randn(len(STRIDES), c))
        self.query_position_embeddings = nn.Embedding(settings.num_queries, c)
        self.encoder = Encoder(config)
        self.enc_output = nn.Linear(c, c)
        self.enc_output_norm = nn.LayerNorm(c)
        self.encoder_output_bbox_embed = box_head(c)
        self.decoder = hf.GroundingDinoDecoder(config)
        for layer in self.decoder.layers:
            layer.self_attn = FusedAttention(config, settings.num_heads)
            layer.encoder_attn_text = FusedAttention(config, settings.num_heads)
            layer.encoder_attn = DeformableAttention(config, settings.num_heads, settings.decoder_points)
        self._reset()

    def _reset(self) -> None:
        """Initialises as Deformable DETR does, with Xavier; `transformers` draws from N(0, 0.02) and zeroes the last
        layer of every head, including that of the query positions. Deformable attention keeps the library's scheme.
        """
        for part in (self.encoder, self.decoder, self.enc_output, self.input_proj_vision):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(cast(Tensor, module.bias))  # none of these layers lacks a bias
            for module in part.modules():
                if isinstance(module, DeformableAttention):
                    self.decoder._init_weights(module)

    def extract_features(self, pixels: Tensor, extents: list[Size]) -> Levels:
        """pixels [B, 3, H, W], normalised, or dense features [B, channels, H/4, W/4]; extents: (height, width) of each
        image in pixels, without padding."""
        members = by_size(extents)
        if len(members) == 1:
            ((height, width),) = members
            side = MASK_STRIDE if self.settings.features == "trunk" else 1
            maps = self._maps(pixels[:, :, : height // side, : width // side])
        else:
            maps = self._padded_maps(pixels, members)
        shown = [[cells(size, stride) for stride in STRIDES] for size in extents]
        return Levels(list(extents), shown, maps[1:], maps[0])

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """The backbone's map at `MASK_STRIDE` and the projected maps at `STRIDES` of images of one size."""
        first, *rest = self.backbone(pixels).feature_maps
        return [first, *(proj(m) for proj, m in zip(self.input_proj_vision, [*rest, rest[-1]], strict=True))]

    def _padded_maps(self, pixels: Tensor, members: dict[Size, list[int]]) -> list[Tensor]:
        """`_maps` of the images of each size, padded to the largest and put together."""
        height, width = (max(sides) for sides in zip(*members, strict=True))
        shapes = [cells((height, width), stride) for stride in (MASK_STRIDE, *STRIDES)]
        padded: list[Tensor] = []
        for (height, width), images in members.items():
            maps = self._maps(pixels[images, :, :height, :width])
            padded = padded or [
                m.new_zeros(len(pixels), m.shape[1], *shape) for m, shape in zip(maps, shapes, strict=True)
            ]
            for whole, m in zip(padded, maps, strict=True):
                whole[images, :, : m.shape[2], : m.shape[3]] = m
        return padded

    def encode(
        self,
        levels: Levels,
        image: Tensor,
        links: Tensor,
        link_valid: Tensor,
        positions: Tensor | None = None,
        blocked: Tensor | None = None,
    ) -> Memory:
        """Runs the encoder, in which pixels and links attend to each other.

        `image` int64 [G]: the image of each group; `links` [G, T, C] with `link_valid` bool [G, T]. `positions` int64
        [G, T] of the links, by default 0, 1, 2 ...; `blocked` bool [G, T, T]: pairs of links without attention, by
        default padding."""
        shapes, shown = tuple((m.shape[-2], m.shape[-1]) for m in levels.sources), levels.shown
        alike = all(sizes == shown[0] for sizes in shown)
        counts = links.new_tensor(shown[:1] if alike else shown, dtype=torch.float32).flip(-1)
        memory = Memory(
            torch.cat([m.flatten(2) for m in levels.sources], 2).transpose(1, 2)[image], links, link_valid, shapes,
            counts if alike else counts[image], any(tuple(sizes) != shapes for sizes in shown),
        )  # fmt: skip
        places = torch.minimum(memory.grid.place + 1, memory.valid_size) / memory.valid_size
        if memory.padded:  # as published: x is 0 in padded rows, y in padded columns
            places = places * (memory.grid.place < memory.valid_size).flip(-1)
        places = sines(places.flip(-1), self.settings.hidden_size // 2, PLACE_TEMPERATURE)
        reference = memory.centers[:, :, None] * memory.valid_ratios[:, None]
        if positions is None:
            positions = torch.arange(links.shape[1], device=links.device)[None]
        if blocked is None:
            alone = torch.eye(links.shape[1], dtype=torch.bool, device=links.device)
            blocked = ~(link_valid[:, :, None] & link_valid[:, None, :] | alone)
        geometry = (
            memory, places + self.level_embed[memory.grid.level], reference,
            sines(positions[..., None].float(), self.settings.hidden_size),
            mask_to_bias(~blocked, links.dtype)[:, None],
        )  # fmt: skip
        for layer in self.encoder.layers:
            memory.vision, memory.links = layer(memory.vision, memory.links, *geometry)
        return memory

    def propose(self, memory: Memory) -> Proposals:
        """A proposal at every place: a box of its level's size around its centre, with the encoder's features
        (Deformable DETR, arXiv 2010.04159, app. A.4)."""
        side = PROPOSAL_SIZE * 2.0 ** memory.grid.level[:, None]
        boxes = torch.cat([memory.centers, side.expand_as(memory.centers)], dim=-1)
        valid = ((boxes > MIN_PROPOSAL) & (boxes < MAX_PROPOSAL)).all(-1)  # centres of padding exceed 1
        features = self.enc_output_norm(self.enc_output(memory.vision.masked_fill(~valid[..., None], 0.0)))
        start = torch.log(boxes / (1 - boxes)).masked_fill(~valid[..., None], float("inf"))
        return Proposals(features, *(v.expand(len(features), *v.shape[1:]) for v in (start, valid)))

    def select(self, proposals: Proposals, scores: Tensor) -> Tensor:
        """int64 [G, Q]: places of the highest scores [G, S]; excluded places come last."""
        most = min(self.settings.num_queries, scores.shape[1])
        return scores.masked_fill(~proposals.valid, float("-inf")).topk(most, dim=1).indices

    def layer(
        self, index: int, hidden: Tensor, reference: Tensor, memory: Memory, self_mask: Tensor | None = None
    ) -> Tensor:
        """One decoder layer: queries [G, Q, C] at `reference` boxes [G, Q, 4] attend to each other, links and pixels.

        `self_mask`: a bias, to be broadcast to [G, heads, Q, Q]; or [G * N, 1, 1, Q / N], where queries attend only
        within each of N blocks."""
        on_levels = reference[:, :, None] * memory.valid_ratios.repeat(1, 1, 2)[:, None]
        return self.decoder.layers[index](
            hidden_states=hidden,
            position_embeddings=self.query_position(reference),
            reference_points=on_levels,
            vision_encoder_hidden_states=memory.vision,
            vision_encoder_attention_mask=memory.vision_valid,
            text_encoder_hidden_states=memory.links,
            text_encoder_attention_mask=memory.link_mask,
            self_attn_mask=self_mask,
            spatial_shapes_list=memory.shapes,
        )[0]

    def query_position(self, reference: Tensor) -> Tensor:
        """Position embeddings [G, Q, C] of boxes [G, Q, 4], relative to the image. The published code's are relative to
        the padded input, so they depend on the padding; without padding both are the same."""
        y_first = torch.cat([reference[..., :2].flip(-1), reference[..., 2:]], dim=-1)
        return self.decoder.reference_points_head(sines(y_first, self.settings.hidden_size // 2))

    def moved(self, reference: Tensor, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Refined boxes in 0..1, float32: `reference` plus the offset that `head` predicts from `hidden` (Deformable
        DETR, arXiv 2010.04159, sec. 4.2)."""
        return (head(hidden).float() + inverse_sigmoid(reference, self.settings.inverse_sigmoid_eps)).sigmoid()


def class_logits(hidden: Tensor, memory: Memory, scale: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    """Class logits float32 [G, Q, T], -inf at padded links: dot products with the encoded links."""
    with torch.autocast(hidden.device.type, enabled=False):  # logits of tens whose differences are hundredths
        logits = hidden.float() @ memory.links.float().transpose(1, 2) * scale + bias
    return logits.masked_fill(~memory.link_valid[:, None], float("-inf"))
