"""The expert detector and segmenter: Grounding DINO driven by link embeddings (VisionLLM v2, arXiv 2406.08394).

All object prompts of a group are looked at together: their links meet the pixels in the encoder, the best places become
queries, and a query belongs to a prompt by the product with its link. There is no limit to the prompts of a group, and
groups of different sizes, like images of different sizes, give in one batch what each gives alone.

Legend: P' object prompts, G groups, T prompts of the largest group, Q queries, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoMLPPredictionHead

from lumen_ray.decoders.base import Decoder, Pixels
from lumen_ray.decoders.dino import DinoTrunk, Levels, Memory, additive, box_head, class_logits, gather_rows
from lumen_ray.decoders.mask_head import MaskHead
from lumen_ray.decoders.settings import GroundingDinoSettings
from lumen_ray.model.aligner import Seats
from lumen_ray.model.superlink import SuperLink
from lumen_ray.structures import Size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1, as the published weights use
FEW_OBJECTS = -4.6  # logit of one query in a hundred


@dataclass
class Stage:
    """What one layer makes of the queries."""

    hidden: Tensor  # [G, Q, C]
    logits: Tensor  # float32 [G, Q, T], -inf at padded links
    boxes: Tensor  # float32 [G, Q, 4] cxcywh in 0..1 of the image without padding


@dataclass
class GroundingDinoRaw:
    """`objects` int64 [P']: the links that are object prompts. `seats`: row (group) and column of each in [G, T]."""

    link: SuperLink
    objects: Tensor
    seats: Seats
    image: Tensor  # int64 [G]: the image of each group, among those that `levels` shows
    sizes: list[Size]  # (height, width) of each group's image in input pixels, without padding
    encoder: Stage  # the selected places as the encoder sees them
    stages: list[Stage]  # of the decoder, the last is the result
    query_valid: Tensor  # bool [G, Q]; an image with fewer places than queries leaves some unused
    memory: Memory
    levels: Levels


class GroundingDinoDecoder(Decoder):
    name = "grounding_dino"
    family = "perception"
    reads = "pixels"

    def __init__(self, settings: GroundingDinoSettings, link_channels: int):
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        self.link_proj = nn.Identity() if link_channels == c else nn.Linear(link_channels, c)
        self.trunk = DinoTrunk(settings)
        self.bbox_embed = box_head(c)
        self.mask_head = MaskHead(c, self.trunk.stride4_channels, settings.mask_channels)
        self.mask_embed = GroundingDinoMLPPredictionHead(c, c, settings.mask_channels, 3)
        if settings.learned_class_scale:
            self.class_scale = nn.Parameter(torch.tensor(c**-0.5))
            self.class_bias = nn.Parameter(torch.tensor(FEW_OBJECTS))

    def forward(self, link: SuperLink, pixels: Pixels) -> GroundingDinoRaw:
        objects = torch.nonzero(link.parent < 0).flatten()
        groups, row = link.group[objects].unique(return_inverse=True)
        seats = Seats.of(row, len(groups))
        shown, place = link.image_index[objects].unique(return_inverse=True)
        image = place.new_zeros(len(groups)).scatter(0, row, place)
        levels = self._see(pixels, shown)
        links = seats.fill(self.link_proj(link.embeddings[objects]))
        link_valid = seats.fill(torch.ones_like(row, dtype=torch.bool)[:, None])[..., 0]
        memory = self.trunk.encode(levels, image, links, link_valid)
        encoder, query_valid = self._propose(memory)
        content = self.trunk.query_position_embeddings.weight[: query_valid.shape[1]].expand(len(groups), -1, -1)
        self_mask = additive(~query_valid, content.dtype)[:, None, None]
        stages = self._decode(memory, content, encoder.boxes.detach(), self_mask)
        sizes = [levels.sizes[i] for i in image.tolist()]
        return GroundingDinoRaw(link, objects, seats, image, sizes, encoder, stages, query_valid, memory, levels)

    def _see(self, pixels: Pixels, shown: Tensor) -> Levels:
        """What the backbone says of the images `shown` (int64): those that prompts are about."""
        images = pixels.images[shown].float() / 255
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        extents = [(int(height), int(width)) for height, width in pixels.extents[shown].tolist()]
        return self.trunk.see((images - mean) / std, extents)

    def _classify(self, hidden: Tensor, memory: Memory) -> Tensor:
        logits = class_logits(hidden, memory)
        return logits * self.class_scale + self.class_bias if self.settings.learned_class_scale else logits

    def _propose(self, memory: Memory) -> tuple[Stage, Tensor]:
        """The places that become queries, best first, and which of them are proposals at all (bool [G, Q])."""
        proposals = self.trunk.propose(memory)
        logits = self._classify(proposals.features, memory)
        chosen = self.trunk.select(proposals, logits.detach().amax(-1))
        features, logits, boxes = (gather_rows(v, chosen) for v in (proposals.features, logits, proposals.logits))
        return Stage(features, logits, boxes.float().sigmoid()), proposals.valid.gather(1, chosen)

    def _decode(self, memory: Memory, hidden: Tensor, reference: Tensor, self_mask: Tensor) -> list[Stage]:
        """A stage for every decoder layer. Layers pass their boxes on without gradient; with `look_forward_twice` the
        next layer's loss reaches them."""
        trunk, stages = self.trunk, []
        for index in range(len(trunk.decoder.layers)):
            hidden = trunk.layer(index, hidden, reference.detach(), memory, self_mask)
            normed = trunk.decoder.layer_norm(hidden)
            boxes = trunk.moved(reference, self.bbox_embed, normed)
            stages.append(Stage(normed, self._classify(normed, memory), boxes))
            reference = trunk.moved(reference.detach(), self.bbox_embed, hidden)
            if not self.settings.look_forward_twice:
                reference = reference.detach()
        return stages

    def mask_features(self, raw: GroundingDinoRaw) -> Tensor:
        """[G, mask channels, h, w] at stride 4."""
        return self.mask_head(raw.memory, raw.levels, raw.image)
