"""The visual branch: CLIP and DINOv2 merged over layers (COMM, arXiv 2310.08825, sec. 3.2).

For each encoder  v = sum_i w_i * Linear_i(LN_i(h_i))  over its chosen layers, with learned scalars w.
DINOv2's v then passes a 2-layer MLP, both are concatenated on channels and projected to the LLM's width.

With `vision.bridge` 'mlp2x_gelu': CLIP alone, one layer through a 2-layer MLP (VisionLLM v2, arXiv 2406.08394,
sec. 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, Dinov2Model

from lumen_ray.meta_init import published_part
from lumen_ray.trunk.settings import VisionSettings

# Each encoder keeps the normalisation it was published with.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LayerMerge(nn.Module):
    """v = sum_i w_i * Linear_i(LN_i(h_i)) (COMM, sec. 3.2), accumulated layer by layer to bound memory."""

    def __init__(self, num_layers: int, in_features: int, out_features: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(in_features) for _ in range(num_layers))
        self.projections = nn.ModuleList(nn.Linear(in_features, out_features) for _ in range(num_layers))
        self.weights = nn.Parameter(torch.full((num_layers,), 1.0 / num_layers))

    def term(self, i: int, hidden: Tensor) -> Tensor:
        """The i-th summand: [B, N, in] -> [B, N, out]."""
        return self.weights[i] * self.projections[i](self.norms[i](hidden))


class Encoder(nn.Module):
    """A ViT of `transformers`, run layer by layer."""

    model: Any  # a CLIPVisionModel or a Dinov2Model
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def patch_size(self) -> int:
        return self.model.config.patch_size

    def _blocks(self) -> nn.ModuleList:
        encoder = self.model.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    def _embed(self, pixels: Tensor) -> Tensor:
        if isinstance(self.model, CLIPVisionModel):
            native = self.model.config.image_size
            resized = pixels.shape[-2:] != (native, native)
            return self.model.pre_layrnorm(self.model.embeddings(pixels, interpolate_pos_encoding=resized))
        return self.model.embeddings(pixels)

    def layer_outputs(self, images: Tensor) -> Iterator[Tensor]:
        """images [B, 3, H, W] in 0..1 -> [B, h*w, width] after each layer, without the [CLS] token."""
        hidden = self._embed((images - self.mean) / self.std)
        for block in self._blocks():
            hidden = block(hidden, None)
            yield hidden[:, 1:]


class MergedEncoder(Encoder):
    """One ViT and its layer merge. Input [B, 3, H, W] in 0..1, output [B, h*w, out_features]."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[int],
        out_features: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__(model, mean, std)
        self.layers = layers
        self.merge = LayerMerge(len(layers), self.model.config.hidden_size, out_features)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in 0..1 -> [B, h*w, out_features]."""
        merged = None
        position = {layer: i for i, layer in enumerate(self.layers)}
        for index, hidden in enumerate(self.layer_outputs(images)):
            if index in position:
                term = self.merge.term(position[index], hidden)
                merged = term if merged is None else merged + term
        assert merged is not None, "no layer is merged"
        return merged


class TokenGrid(nn.Module):
    """Base of the visual branches: image tokens of `token_merge` x `token_merge` patches each, row by row."""

    merged_width: int  # channels of the map that region encoder and dense features read

    def __init__(self, patch_size: int, token_merge: int):
        super().__init__()
        self.patch_size = patch_size
        self.token_merge = token_merge

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the image tokens of an input of `height` x `width` pixels."""
        side = self.patch_size * self.token_merge
        return height // side, width // side

    def patches(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of images [B, 3, H, W]."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def shuffle(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """Pixel shuffle, m x m neighbouring tokens concatenated on channels: [B, h*w, C] -> [B, h*w / m^2, C * m^2]."""
        m = self.token_merge
        if m == 1:
            return tokens
        blocks = tokens.unflatten(1, (h // m, m, w // m, m)).permute(0, 1, 3, 2, 4, 5)
        return blocks.flatten(3).flatten(1, 2)


def as_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w], contiguous: the backward pass of torch's GroupNorm crashes on channels-last input
    that needs no gradient."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w).contiguous()


class BridgedVision(TokenGrid):
    """CLIP alone, as in LLaVA and VisionLLM v2 (sec. 3.1): image tokens are one layer's output through a 2-layer MLP.

    The map for the region encoder and the dense features concatenates the outputs of the last `LEVELS` layers on
    channels.
    """

    LEVELS = 3

    def __init__(self, settings: VisionSettings, image_size: int, llm_width: int):
        config = settings.clip_config(image_size)
        assert config is not None, "VisionSettings requires clip for this bridge"
        super().__init__(settings.patch_size(image_size), settings.token_merge)
        self.clip = Encoder(published_part(partial(CLIPVisionModel, config)), CLIP_MEAN, CLIP_STD)
        self.dinov2 = self.from_stem = None
        self.layer = config.num_hidden_layers - (2 if settings.clip_layers == "penultimate" else 1)
        self.merged_width = self.LEVELS * config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(config.hidden_size * self.token_merge**2, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, images: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in 0..1 -> (image tokens [B, P, llm_width], map [B, merged_width, h, w]).

        P is h*w / token_merge^2. `stem` is unused, for the signature of `CommVision`.
        """
        h, w = self.patches(images)
        chosen: Tensor | None = None
        levels: list[Tensor] = []
        for index, hidden in enumerate(self.clip.layer_outputs(images)):
            if index == self.layer:
                chosen = hidden
            levels = [*levels, hidden][-self.LEVELS :]
        assert chosen is not None, "the settings name a layer of the encoder"
        return self.projector(self.shuffle(chosen, h, w)), as_map(torch.cat(levels, dim=-1), h, w)


class CommVision(TokenGrid):
    """CLIP + DINOv2 -> image tokens of the LLM's width. Either encoder may be switched off in the settings.

    With `stem_width` the tokens also read a convolutional stem, as a third encoder that learns from few images: some
    thousand, where a ViT trained from scratch needs a hundred thousand ("Early Convolutions Help Transformers See
    Better", arXiv 2106.14881).
    """

    clip: MergedEncoder | None
    dinov2: MergedEncoder | None
    from_stem: nn.Linear | None

    def __init__(
        self, settings: VisionSettings, image_size: int, llm_width: int, token_std: float = 0.02, stem_width: int = 0
    ):
        super().__init__(settings.patch_size(image_size), settings.token_merge)
        self.clip = self.dinov2 = None
        width = 0
        if (clip := settings.clip_config(image_size)) is not None:
            count = clip.num_hidden_layers
            layers = list(range(count)) if settings.clip_layers == "all" else [count - 1]
            model = published_part(partial(CLIPVisionModel, clip))
            self.clip = MergedEncoder(model, layers, clip.hidden_size, CLIP_MEAN, CLIP_STD)
            width += clip.hidden_size
        if (dinov2 := settings.dinov2_config(image_size)) is not None:
            count, c = dinov2.num_hidden_layers, dinov2.hidden_size
            merged = {"all": count, "last_quarter": math.ceil(count / 4), "last": 1}[settings.dinov2_layers]
            layers = list(range(count - merged, count))
            encoder = published_part(partial(Dinov2Model, dinov2))
            self.dinov2 = MergedEncoder(encoder, layers, c, IMAGENET_MEAN, IMAGENET_STD)
            hidden = settings.mlp_ratio * c
            self.dinov2_mlp = nn.Sequential(nn.Linear(c, hidden), nn.GELU(), nn.Linear(hidden, c))
            width += c
        self.merged_width = width
        self.projector = nn.Linear(width * self.token_merge**2, llm_width)
        self.from_stem = nn.Linear(stem_width + 5, llm_width) if stem_width else None
        # Image tokens start at the scale of word embeddings; much larger ones would dominate the LLM's residual stream.
        self.token_norm = nn.LayerNorm(llm_width)
        nn.init.constant_(self.token_norm.weight, token_std)

    def forward(self, images: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in 0..1 -> (image tokens [B, P, llm_width], merged map [B, merged_width, h, w]).

        P is h*w / token_merge^2. `stem`: [B, stem_width, h', w'], needed if the tokens read the stem.
        """
        encoded = []
        if self.clip is not None:
            encoded.append(self.clip(images))
        if self.dinov2 is not None:
            encoded.append(self.dinov2_mlp(self.dinov2(images)))
        merged = torch.cat(encoded, dim=-1)
        h, w = self.patches(images)
        tokens = self.projector(self.shuffle(merged, h, w))
        if self.from_stem is not None:
            assert stem is not None, "built with stem_width, called without a stem"
            tokens = tokens + self.from_stem(self._stem_cells(images, stem))
        return self.token_norm(tokens), as_map(merged, h, w)

    def _stem_cells(self, images: Tensor, stem: Tensor) -> Tensor:
        """Stem features pooled under each image token, [B, P, stem_width + 5]: with the mean colour, which the stem's
        normalisation removes, and the cell's centre in -1..1 (CoordConv, arXiv 1807.03247)."""
        rows, columns = self.grid(*images.shape[-2:])
        y, x = ((2 * torch.arange(n, device=images.device) + 1) / n - 1 for n in (rows, columns))
        place = torch.stack(torch.meshgrid(x, y, indexing="xy")).to(stem.dtype).expand(len(images), -1, -1, -1)
        cells = [F.adaptive_avg_pool2d(x, (rows, columns)) for x in (stem, images * 4 - 2)]
        return torch.cat([*cells, place], dim=1).flatten(2).transpose(1, 2)


def build_vision(
    settings: VisionSettings, image_size: int, llm_width: int, token_std: float, stem_width: int
) -> CommVision | BridgedVision:
    """Builds the visual branch of the settings; `token_std` and `stem_width` apply to `CommVision`."""
    if settings.bridge == "mlp2x_gelu":
        return BridgedVision(settings, image_size, llm_width)
    return CommVision(settings, image_size, llm_width, token_std, stem_width)
