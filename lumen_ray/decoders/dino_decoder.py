"""What the decoders on Grounding DINO's transformer do alike: see, propose, decode, classify."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lumen_ray.decoders.base import Decoder, Pixels
from lumen_ray.decoders.dino import DinoTrunk, Levels, Memory, box_head, class_logits, gather_rows
from lumen_ray.decoders.grounding_dino import FEW_OBJECTS, MEAN, STD, Groups, Stage
from lumen_ray.decoders.settings import DinoSettings


class DinoDecoder(Decoder):
    """`settings` also says `look_forward_twice` and `learned_class_scale`."""

    family = "perception"
    reads = "pixels"
    independent = False

    def __init__(self, settings: DinoSettings, link_channels: int):
        super().__init__()
        self.settings = settings
        c = settings.hidden_size
        self.link_proj = self._link_proj(link_channels)
        self.trunk = DinoTrunk(settings)
        self.bbox_embed = box_head(c)
        if settings.learned_class_scale:
            self.class_scale = nn.Parameter(torch.tensor(c**-0.5))
            self.class_bias = nn.Parameter(torch.tensor(FEW_OBJECTS))

    def _link_proj(self, link_channels: int) -> nn.Module:
        c = self.settings.hidden_size
        return nn.Identity() if link_channels == c else nn.Linear(link_channels, c)

    def _see(self, pixels: Pixels, groups: Groups) -> Levels:
        images = pixels.images[groups.shown].float() / 255
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        extents = [(height, width) for height, width in pixels.extents[groups.shown].tolist()]
        return self.trunk.see((images - mean) / std, extents)

    def _encode(self, levels: Levels, groups: Groups, links: Tensor) -> tuple[Memory, Tensor]:
        """Pixels and object prompts, links [P', C], read each other; and the links as they were, [G, T, C]."""
        seats = groups.seats
        table = seats.fill(links)
        valid = seats.fill(torch.ones_like(seats.row, dtype=torch.bool)[:, None])[..., 0]
        return self.trunk.encode(levels, groups.image, table, valid), table

    def _classify(self, hidden: Tensor, memory: Memory) -> Tensor:
        if self.settings.learned_class_scale:
            return class_logits(hidden, memory, self.class_scale, self.class_bias)
        return class_logits(hidden, memory)

    def _propose(self, memory: Memory) -> tuple[Stage, Tensor]:
        """The places that become queries, best first, and which of them are proposals at all (bool [G, Q])."""
        proposals = self.trunk.propose(memory)
        logits = self._classify(proposals.features, memory)
        chosen = self.trunk.select(proposals, logits.detach().amax(-1))
        features, logits, boxes = (gather_rows(v, chosen) for v in (proposals.features, logits, proposals.logits))
        return Stage(features, logits, boxes.float().sigmoid()), proposals.valid.gather(1, chosen)

    def _decode(
        self, memory: Memory, hidden: Tensor, reference: Tensor, self_mask: Tensor, layers: Iterable[int]
    ) -> tuple[list[Stage], Tensor, Tensor]:
        """A stage for each of the decoder's `layers`; and the queries and their boxes as the next layer gets them.

        Layers pass boxes on without gradient; with `look_forward_twice` the next layer's loss reaches them."""
        trunk, stages = self.trunk, []
        for index in layers:
            hidden = trunk.layer(index, hidden, reference.detach(), memory, self_mask)
            normed = trunk.decoder.layer_norm(hidden)
            boxes = trunk.moved(reference, self.bbox_embed, normed)
            stages.append(Stage(normed, self._classify(normed, memory), boxes))
            reference = trunk.moved(reference.detach(), self.bbox_embed, hidden)
            if not self.settings.look_forward_twice:
                reference = reference.detach()
        return stages, hidden, reference
