"""Presence before place: whether the object of a prompt is in the image at all.

SAM 3 (arXiv 2511.16719, sec. 3) gives this question to one token of its decoder, so that places need not answer it.
Here it has one logit per prompt, from the link and a look at all places: what the link reads there by attention, and
the place that fits it best. Most classes of a long list are not in an image, and only the others meet the aligner.

Legend: P prompts, B maps, S prompts per map (padded), L places, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.common.ragged import Seats

#: Matches of prompts and places that are held at a time.
MOST_MATCHES = 1 << 24


class PresenceHead(nn.Module):
    """Link tokens and the map of each prompt's image -> presence logits."""

    def __init__(self, channels: int):
        super().__init__()
        self.token = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 2 * channels))
        self.place = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3 * channels))
        self.read = nn.Sequential(
            nn.LayerNorm(2 * channels), nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, 1)
        )
        self.scale = nn.Parameter(torch.full((1,), 4.0))
        self.bias = nn.Parameter(torch.full((1,), -3.0))

    def forward(self, tokens_PC: Tensor, places_BLC: Tensor, image_index: Tensor) -> Tensor:
        """tokens [P, C], places [B, L, C], image_index int64 [P] -> float32 [P]."""
        query, fits = self.token(tokens_PC).chunk(2, dim=-1)
        key, value, against = self.place(places_BLC).chunk(3, dim=-1)
        width, (images, places) = key.shape[-1], key.shape[:2]
        found = []
        step = max(1, MOST_MATCHES // max(1, images * places))
        for some in torch.arange(len(tokens_PC), device=tokens_PC.device).split(step):
            seats = Seats.of(image_index[some], images)
            read = F.scaled_dot_product_attention(seats.fill(query[some]), key, value)  # B S C
            best = (seats.fill(fits[some]) @ against.transpose(1, 2)).amax(-1, keepdim=True) / width**0.5  # B S 1
            asked = torch.cat([tokens_PC[some], seats.take(read)], dim=-1)
            found.append(self.read(asked)[:, 0] + seats.take(best)[:, 0] * self.scale)
        return (torch.cat(found) if found else tokens_PC.new_zeros(0)).float() + self.bias
