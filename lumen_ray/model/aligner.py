"""Lumen's vision-language aligner (arXiv 2403.07304, sec. 3.2): words meet places.

Two-way attention per prompt: the link token reads the dense features, then every place reads the link token. A place
chooses between the token and a learned "nothing here" key, since a softmax over one key would be constant. Prompts
never see each other.

Legend: P prompts, B images, L places, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoWayLayer(nn.Module):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.token_norm, self.place_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token_query, self.token_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.place_key_value = nn.Linear(channels, 2 * channels)
        self.token_mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.place_query = nn.Linear(channels, channels)
        self.token_key_value = nn.Linear(channels, 2 * channels)
        self.null_key = nn.Parameter(torch.zeros(num_heads, channels // num_heads))
        self.place_out = nn.Linear(channels, channels)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, token_PC: Tensor, places_PLC: Tensor, position_LC: Tensor) -> tuple[Tensor, Tensor]:
        """token [P, C], places [P, L, C], position [L, C] -> both updated."""
        places = self.place_norm(places_PLC)
        # the token reads the places
        key, value = self.place_key_value(places + position_LC).chunk(2, dim=-1)
        query = self._heads(self.token_query(self.token_norm(token_PC))).unsqueeze(2)  # P H 1 D
        key, value = self._heads(key).transpose(1, 2), self._heads(value).transpose(1, 2)  # P H L D
        read = F.scaled_dot_product_attention(query, key, value)[:, :, 0].flatten(1)
        token_PC = token_PC + self.token_out(read)
        token_PC = token_PC + self.token_mlp(token_PC)
        # the places read the token
        query = self._heads(self.place_query(places))  # P L H D
        key, value = (self._heads(t) for t in self.token_key_value(token_PC).chunk(2, dim=-1))  # P H D
        scale = 1 / math.sqrt(query.shape[-1])
        match = torch.einsum("plhd,phd->plh", query, key) - torch.einsum("plhd,hd->plh", query, self.null_key)
        weight = torch.sigmoid(match * scale).unsqueeze(-1)  # softmax over {token, nothing}
        return token_PC, places_PLC + self.place_out((weight * value.unsqueeze(1)).flatten(2))


class Aligner(nn.Module):
    """Link tokens and dense features -> aligned tokens [P, C] and per-prompt places [P, L, C]."""

    def __init__(self, channels: int, num_heads: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(channels, num_heads) for _ in range(num_layers))

    def forward(self, tokens_PC: Tensor, places_BLC: Tensor, image_index: Tensor, position_LC: Tensor):
        places = places_BLC[image_index]
        for layer in self.layers:
            tokens_PC, places = layer(tokens_PC, places, position_LC)
        return tokens_PC, places


def sine_position(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Fixed 2-D sine position embedding [height * width, channels]; y in the first half, x in the second."""
    quarter = channels // 4
    frequency = torch.exp(torch.arange(quarter, device=device) * (-math.log(100.0) / max(1, quarter - 1)))
    y = (torch.arange(height, device=device) + 0.5) / height * 2 * math.pi
    x = (torch.arange(width, device=device) + 0.5) / width * 2 * math.pi
    y, x = y[:, None] * frequency, x[:, None] * frequency
    y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(-1, width, -1)
    x = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(height, -1, -1)
    return F.pad(torch.cat([y, x], dim=-1), (0, channels - 4 * quarter)).reshape(height * width, channels)
