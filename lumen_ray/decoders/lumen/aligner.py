"""Lumen's vision-language aligner (arXiv 2403.07304, sec. 3.2).

Two-way attention per prompt: the link token attends to the dense features, then every place attends to the link token.
A place chooses between the token and a learned null key, since a softmax over one key would be constant. Prompts do not
attend to each other.

Legend: P prompts, B maps, S prompts per map (padded), L places, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen_ray.decoders.common.ragged import Seats


@dataclass
class AlignedPlaces:
    """The aligned places of every prompt, [P, L, C], in parts: a map that prompts share, plus what each wrote to it, by
    head, times a weight per place. So most of what is asked of them needs no map per prompt."""

    maps: Tensor  # [B, L, C]
    seats: Seats  # the map of each prompt
    weight: Tensor  # [P, H, L]
    written: Tensor  # [P, H, C]

    def whole(self) -> Tensor:
        """All places of all prompts, [P, L, C]."""
        return torch.baddbmm(self.maps[self.seats.row], self.weight.transpose(1, 2), self.written)

    def at(self, prompts: Tensor, places: Tensor) -> Tensor:
        """The places [N] of prompts [N]: [N, C]."""
        written = torch.einsum("nh,nhc->nc", self.weight[prompts, :, places], self.written[prompts])
        return self.maps[self.seats.row[prompts], places] + written

    def matched(self, norm: nn.LayerNorm, words: Tensor) -> Tensor:
        """The products of all places, normalised, with a vector of their prompt: words [P, C] -> float32 [P, L].

        LayerNorm is a product with the centred places over their length, and both are sums over the parts: one matrix
        product of all prompts with each map gives all that is per prompt and place.
        """
        maps, written = self.maps.float(), self.written.float()
        maps, written = maps - maps.mean(-1, keepdim=True), written - written.mean(-1, keepdim=True)
        words, weight = words.float(), self.weight.float()
        scaled = words * norm.weight.float()
        asked = torch.cat([scaled[:, None], 2 * written], dim=1)  # P 1+H C
        table = self.seats.fill(asked.flatten(1)).unflatten(-1, asked.shape[1:])  # B S 1+H C
        found = table.flatten(1, 2) @ maps.transpose(1, 2)
        product, twice = self.seats.take(found.unflatten(1, table.shape[1:3])).split([1, asked.shape[1] - 1], dim=1)
        product = product[:, 0] + (weight * (written @ scaled[..., None])).sum(1)
        squares = maps.square().sum(-1)[self.seats.row]
        squares = squares + (weight * (twice + (written @ written.transpose(1, 2)) @ weight)).sum(1)
        variance = squares.clamp_min(0) / maps.shape[-1]  # rounding may make it negative
        return product * torch.rsqrt(variance + norm.eps) + (words @ norm.bias.float())[:, None]


class TwoWayLayer(nn.Module):
    """One layer of two-way attention between link tokens and places."""

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

    def forward(
        self, token_PC: Tensor, places_BLC: Tensor, seats: Seats, position_LC: Tensor
    ) -> tuple[Tensor, AlignedPlaces]:
        """token [P, C], places [B, L, C], position [L, C] -> token [P, C] and places of P prompts. `seats`: the map of
        each prompt.

        Both attentions are batched matrix products per map, and the output projection is applied to a prompt's values
        before they are broadcast over places: no C x C product per prompt and place.
        """
        places = self.place_norm(places_BLC)
        # tokens attend to places
        key, value = self.place_key_value(places + position_LC).chunk(2, dim=-1)
        key, value = self._heads(key).transpose(1, 2), self._heads(value).transpose(1, 2)  # B H L D
        query = self._heads(seats.fill(self.token_query(self.token_norm(token_PC)))).transpose(1, 2)  # B H S D
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # B S C
        token_PC = token_PC + self.token_out(seats.take(read))
        token_PC = token_PC + self.token_mlp(token_PC)
        # places attend to the token
        query = self._heads(self.place_query(places)).transpose(1, 2)  # B H L D
        key, value = (self._heads(t) for t in self.token_key_value(token_PC).chunk(2, dim=-1))  # P H D
        scale = 1 / math.sqrt(query.shape[-1])
        against = self._heads(seats.fill((key - self.null_key).flatten(1))).transpose(1, 2)  # B H S D
        match = torch.matmul(against, query.transpose(2, 3))  # B H S L
        weight = torch.sigmoid(seats.take(match.transpose(1, 2)) * scale)  # P H L; softmax over {token, null}
        written = torch.einsum("phd,chd->phc", value, self._heads(self.place_out.weight))
        return token_PC, AlignedPlaces(places_BLC + self.place_out.bias, seats, weight, written)


class Aligner(nn.Module):
    """Link tokens and dense features -> aligned tokens [P, C] and the places of each prompt.

    The first layer has one map per image, the others one per prompt.
    """

    def __init__(self, channels: int, num_heads: int, num_layers: int):
        super().__init__()
        self.num_heads = num_heads
        self.layers = nn.ModuleList(TwoWayLayer(channels, num_heads) for _ in range(num_layers))

    def forward(
        self, tokens_PC: Tensor, places_BLC: Tensor, image_index: Tensor, position_LC: Tensor
    ) -> tuple[Tensor, AlignedPlaces]:
        seats = Seats.of(image_index, len(places_BLC))
        if len(tokens_PC) == 0:
            nothing = (places_BLC.new_zeros(0, self.num_heads, size) for size in places_BLC.shape[1:])
            return tokens_PC, AlignedPlaces(places_BLC, seats, *nothing)
        maps = places_BLC
        for number, layer in enumerate(self.layers, 1):
            tokens_PC, places = layer(tokens_PC, maps, seats, position_LC)
            if number < len(self.layers):
                maps = places.whole()
                seats = Seats.of(torch.arange(len(maps), device=maps.device), len(maps))
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
