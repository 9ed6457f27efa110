"""The visual branch: CLIP and DINOv2 merged over layers (COMM, arXiv 2310.08825, sec. 3.2).

For each encoder  v = sum_i w_i * Linear_i(LN_i(h_i))  over its chosen layers, with learned scalars w.
DINOv2's v then passes a 2-layer MLP, both are concatenated on channels and projected to the LLM's width.

Or, by setting, CLIP alone with a 2-layer MLP on one of its layers (VisionLLM v2, arXiv 2406.08394, sec. 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    """v = sum_i w_i * Linear_i(LN_i(h_i)), added up as the layers run, so that their maps are never held together."""

    def __init__(self, num_layers: int, in_features: int, out_features: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(in_features) for _ in range(num_layers))
        self.projections = nn.ModuleList(nn.Linear(in_features, out_features) for _ in range(num_layers))
        self.weights = nn.Parameter(torch.full((num_layers,), 1.0 / num_layers))

    def term(self, i: int, hidden: Tensor) -> Tensor:
        """The i-th summand: [B, N, in] -> [B, N, out]."""
        return self.weights[i] * self.projections[i](self.norms[i](hidden))


class Encoder(nn.Module):
    """One ViT of `transformers`, run layer by layer."""

    def __init__(self, model: nn.Module, mean: tuple, std: tuple):
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
        """images [B, 3, H, W] in 0..1 -> [B, h*w, width] after each layer; [CLS] is left out, it has no place in the
        image."""
        hidden = self._embed((images - self.mean) / self.std)
        for block in self._blocks():
            hidden = block(hidden, None)
            yield hidden[:, 1:]


class MergedEncoder(Encoder):
    """One ViT and its layer merge. Input [B, 3, H, W] in 0..1, output [B, h*w, out_features]."""

    def __init__(self, model: nn.Module, layers: list[int], out_features: int, mean: tuple, std: tuple):
        super().__init__(model, mean, std)
        self.layers = layers
        self.merge = LayerMerge(len(layers), model.config.hidden_size, out_features)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in 0..1 -> [B, h*w, out_features]."""
        merged = None
        position = {layer: i for i, layer in enumerate(self.layers)}
        for index, hidden in enumerate(self.layer_outputs(images)):
            if index in position:
                term = self.merge.term(position[index], hidden)
                merged = term if merged is None else merged + term
        return merged


class TokenGrid(nn.Module):
    """What every visual branch knows of its image tokens: `token_merge` squared patches each, row by row."""

    def __init__(self, patch_size: int, token_merge: int):
        super().__init__()
        self.patch_size = patch_size
        self.token_merge = token_merge

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the image tokens of an input of that many pixels."""
        side = self.patch_size * self.token_merge
        return height // side, width // side

    def patches(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of images [B, 3, H, W]."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def shuffle(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """Neighbouring tokens side by side on channels: [B, h*w, C] -> [B, h*w / m^2, C * m^2]."""
        m = self.token_merge
        if m == 1:
            return tokens
        blocks = tokens.unflatten(1, (h // m, m, w // m, m)).permute(0, 1, 3, 2, 4, 5)
        return blocks.flatten(3).flatten(1, 2)


def as_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w]; contiguous, because torch's GroupNorm backward crashes on channels-last input that
    needs no gradient."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w).contiguous()


class BridgedVision(TokenGrid):
    """CLIP alone, as in LLaVA and VisionLLM v2: one of its layers through a 2-layer MLP gives the image tokens.

    The map that the region encoder and the dense features read holds the outputs of the last `LEVELS` layers side by
    side on channels.
    """

    LEVELS = 3

    def __init__(self, settings: VisionSettings, image_size: int, llm_width: int):
        config = settings.configs(image_size)["clip"]
        super().__init__(config.patch_size, settings.token_merge)
        self.clip = Encoder(published_part(lambda: CLIPVisionModel(config)), CLIP_MEAN, CLIP_STD)
        self.dinov2 = self.from_stem = None
        self.layer = config.num_hidden_layers - (2 if settings.clip_layers == "penultimate" else 1)
        self.merged_width = self.LEVELS * config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(config.hidden_size * self.token_merge**2, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, images: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in 0..1 -> (image tokens [B, P, llm_width], map [B, merged_width, h, w]).

        P is h*w, divided by `token_merge` squared. `stem` is for branches that read it.
        """
        h, w = self.patches(images)
        chosen, levels = None, []
        for index, hidden in enumerate(self.clip.layer_outputs(images)):
            if index == self.layer:
                chosen = hidden
            levels = [*levels, hidden][-self.LEVELS :]
        return self.projector(self.shuffle(chosen, h, w)), as_map(torch.cat(levels, dim=-1), h, w)


class CommVision(TokenGrid):
    """CLIP + DINOv2 -> image tokens of the LLM's width. Either encoder may be switched off in the settings.

    With `stem_width` the tokens also read a convolutional stem, as a third encoder that learns from few images: what a
    ViT from fresh weights needs a hundred thousand of, it sees after some thousand ("Early Convolutions Help
    Transformers See Better", arXiv 2106.14881).
    """

    def __init__(
        self, settings: VisionSettings, image_size: int, llm_width: int, token_std: float = 0.02, stem_width: int = 0
    ):
        configs = settings.configs(image_size)
        super().__init__(next(iter(configs.values())).patch_size, settings.token_merge)  # both encoders share a grid
        self.clip = self.dinov2 = None
        width = 0
        if (config := configs.get("clip")) is not None:
            count = config.num_hidden_layers
            layers = list(range(count)) if settings.clip_layers == "all" else [count - 1]
            self.clip = MergedEncoder(
                published_part(lambda: CLIPVisionModel(config)), layers, config.hidden_size, CLIP_MEAN, CLIP_STD
            )
            width += config.hidden_size
        if (config := configs.get("dinov2")) is not None:
            count = config.num_hidden_layers
            chosen = {"all": count, "last_quarter": math.ceil(count / 4), "last": 1}[settings.dinov2_layers]
            self.dinov2 = MergedEncoder(
                published_part(lambda: Dinov2Model(config)),
                list(range(count - chosen, count)),
                config.hidden_size,
                IMAGENET_MEAN,
                IMAGENET_STD,
            )
            hidden = settings.mlp_ratio * config.hidden_size
            self.dinov2_mlp = nn.Sequential(
                nn.Linear(config.hidden_size, hidden), nn.GELU(), nn.Linear(hidden, config.hidden_size)
            )
            width += config.hidden_size
        self.merged_width = width
        self.projector = nn.Linear(width * self.token_merge**2, llm_width)
        self.from_stem = nn.Linear(stem_width + 5, llm_width) if stem_width else None
        # Image tokens enter on the scale of word embeddings; much longer ones would pass the LLM's layers unchanged.
        self.token_norm = nn.LayerNorm(llm_width)
        nn.init.constant_(self.token_norm.weight, token_std)

    def forward(self, images: Tensor, stem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in 0..1 -> (image tokens [B, P, llm_width], merged map [B, merged_width, h, w]).

        P is h*w, divided by `token_merge` squared. `stem`: [B, stem_width, h', w'], for tokens that read it.
        """
        parts = []
        if self.clip is not None:
            parts.append(self.clip(images))
        if self.dinov2 is not None:
            parts.append(self.dinov2_mlp(self.dinov2(images)))
        merged = torch.cat(parts, dim=-1)
        h, w = self.patches(images)
        tokens = self.projector(self.shuffle(merged, h, w))
        if self.from_stem is not None:
            tokens = tokens + self.from_stem(self._stem_cells(images, stem))
        return self.token_norm(tokens), as_map(merged, h, w)

    def _stem_cells(self, images: Tensor, stem: Tensor) -> Tensor:
        """What the stem shows under each image token: [B, P, stem_width + 5]. With the mean colour, which normalisation
        in the stem hides, and the cell's centre in -1..1 (arXiv 1807.03247), which a convolution cannot know."""
        rows, columns = self.grid(*images.shape[-2:])
        y, x = ((2 * torch.arange(n, device=images.device) + 1) / n - 1 for n in (rows, columns))
        place = torch.stack(torch.meshgrid(x, y, indexing="xy")).to(stem.dtype).expand(len(images), -1, -1, -1)
        cells = [F.adaptive_avg_pool2d(x, (rows, columns)) for x in (stem, images * 4 - 2)]
        return torch.cat([*cells, place], dim=1).flatten(2).transpose(1, 2)


def build_vision(
    settings: VisionSettings, image_size: int, llm_width: int, token_std: float, stem_width: int
) -> CommVision | BridgedVision:
    """The visual branch that the settings describe; `token_std` and `stem_width` are COMM's."""
    if settings.bridge == "mlp2x_gelu":
        return BridgedVision(settings, image_size, llm_width)
    return CommVision(settings, image_size, llm_width, token_std, stem_width)
