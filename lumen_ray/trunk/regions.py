"""Region encoder: encodes a visual prompt (box, point, scribble, polygon, mask) as one LLM embedding.

VisionLLM v2 (arXiv 2406.08394), sec. 3.1: convolutions over image + binary mask give a map that is added to the vision
features, which are then pooled inside the mask and projected; the result replaces a `<region>` token.

`RegionEncoder` pools the vision branch's merged map; `LevelRegionEncoder` is that of the released VisionLLM v2.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lumen_ray.structures import Region, Size, as_size
from lumen_ray.trunk.comm import CLIP_MEAN, CLIP_STD, BridgedVision, TokenGrid
from lumen_ray.trunk.settings import RegionSettings

#: Regions whose embeddings are computed together at inference.
AT_ONCE = 32


def region_mask(region: Region, input_size: int | Size) -> np.ndarray:
    """Rasterises a region to a binary mask of the model input, uint8 [H, W]; `input_size` is (H, W) or the side of a
    square.

    The image is scaled to fit and placed at the top left, as by `transforms.fit`. Points and scribbles are drawn with a
    radius of 3 % of the input's longer side.
    """
    input_h, input_w = as_size(input_size)
    scale = min(input_h / region.size[0], input_w / region.size[1])
    canvas = Image.new("L", (input_w, input_h), 0)
    draw = ImageDraw.Draw(canvas)
    if region.kind == "mask":
        from pycocotools import mask as coco_mask  # imported here: running a model does not need it

        array = coco_mask.decode(region.rle)
        height, width = region.size
        scaled = Image.fromarray(array * 255).resize((max(1, round(width * scale)), max(1, round(height * scale))))
        canvas.paste(scaled, (0, 0))
        inside = np.asarray(canvas) > 127
        if array.any() and not inside.any():  # smaller than an input pixel: its centre as a point
            rows, columns = np.nonzero(array)
            center = np.array([[columns.mean() + 0.5, rows.mean() + 0.5]])
            return region_mask(Region("point", region.size, center), input_size)
        return inside.astype(np.uint8)
    assert region.points is not None, "all other kinds have points"
    points = [(float(x), float(y)) for x, y in np.multiply(region.points, scale)]
    radius = 0.03 * max(input_h, input_w)
    if region.kind == "box":
        (x1, y1), (x2, y2) = points[:2]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), fill=1)
    elif region.kind == "polygon":
        draw.polygon(points, fill=1, outline=1)
    else:
        if region.kind == "scribble":
            draw.line(points, fill=1, width=max(1, round(2 * radius)))
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.asarray(canvas).copy()


class RegionEncoder(nn.Module):
    """Pools the vision branch's merged map plus convolutions over image and mask inside the mask."""

    def __init__(self, vision_width: int, llm_width: int, patch_size: int, channels: int = 16):
        super().__init__()
        self.patch_size = patch_size
        self.convs = nn.Sequential(
            nn.Conv2d(4, channels, 4, stride=4),
            nn.GroupNorm(1, channels),
            nn.GELU(),
            nn.Conv2d(channels, vision_width, kernel_size=patch_size // 4, stride=patch_size // 4),
        )
        self.projector = nn.Sequential(
            nn.LayerNorm(vision_width), nn.Linear(vision_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, images: Tensor, merged: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
        """One embedding per region.

        images [B, 3, H, W] in 0..1; merged [B, C, h, w] the vision branch's map; masks [R, H, W] in {0, 1};
        image_index [R] the image each region lies in. Returns [R, llm_width].
        """
        masks = masks.to(images.dtype).unsqueeze(1)
        trimmed = self.patch_size // 4 * 4  # stride-4 cells must tile a patch: 14 pixels are resized to 12
        if trimmed != self.patch_size:
            shape = [side // self.patch_size * trimmed for side in images.shape[-2:]]
            stacked = torch.cat([images[image_index], masks], dim=1)
            stacked = F.interpolate(stacked, shape, mode="bilinear", align_corners=False)
        else:
            stacked = torch.cat([images[image_index], masks], dim=1)
        features = merged[image_index] + self.convs(stacked)
        inside = F.adaptive_avg_pool2d(masks, features.shape[-2:])
        weight = inside / inside.sum(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return self.projector((features * weight).sum(dim=(2, 3)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def sampling_weights(pixels: int, cells: int, sampling: str, like: Tensor) -> Tensor:
    """Bilinear weights of a map's cells at each pixel along one axis: [pixels, cells], dtype and device of `like`.

    'centre': sampled at pixel centres, with the map's edge replicated. 'corner': sampled at each pixel's first edge,
    half a pixel off, with zeros outside the map.
    """
    offset = 0.5 if sampling == "centre" else 0.0
    place = (torch.arange(pixels, device=like.device, dtype=torch.float32) + offset) * (cells / pixels) - 0.5
    if sampling == "centre":
        place = place.clamp(0, cells - 1)
    centres = torch.arange(cells, device=like.device, dtype=torch.float32)
    return (1 - (place[:, None] - centres).abs()).clamp_min(0).to(like.dtype)


class LevelRegionEncoder(nn.Module):
    """VisionLLM v2's region encoder (sec. 3.1). The last layers of CLIP are added one by one to a map of image and
    mask; after each, the map is sampled at every pixel of the mask and averaged. The mean over the levels is projected.

    A mean of bilinear samples is a weighted sum of the map's cells, so all pixels fit in memory (the reference samples
    a random subset of a large region).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vision_width: int, llm_width: int, patch_size: int, settings: RegionSettings, levels: int):
        super().__init__()
        self.levels = levels
        self.sampling = settings.sampling
        channels, half = settings.channels, patch_size // 2
        self.convs = nn.Sequential(
            nn.Conv2d(4, channels // 4, half, stride=half),
            ChannelNorm(channels // 4),
            nn.GELU(),
            nn.Conv2d(channels // 4, channels, 2, stride=2),
            ChannelNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, vision_width // levels, 1),
        )
        self.projector = nn.Linear(vision_width // levels, llm_width)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)

    def pool(self, features: Tensor, masks: Tensor) -> Tensor:
        """Mean of features [R, C, h, w] over the pixels of masks [R, 1, H, W]: [R, C]; 0 for an empty mask."""
        (height, width), (h, w) = masks.shape[-2:], features.shape[-2:]
        rows = sampling_weights(height, h, self.sampling, masks)
        columns = sampling_weights(width, w, self.sampling, masks)
        weight = rows.T @ masks.squeeze(1) @ columns / masks.sum(dim=(1, 2, 3)).clamp_min(1)[:, None, None]
        return torch.einsum("rhw,rchw->rc", weight, features)

    def forward(self, images: Tensor, merged: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
        """One embedding per region.

        images [B, 3, H, W] in 0..1; merged [B, levels * C, h, w] outputs of CLIP's last layers; masks [R, H, W] in
        {0, 1}; image_index [R] the image each region lies in. Returns [R, llm_width].
        """
        masks = masks.to(images.dtype).unsqueeze(1)
        normalised = (images - self.mean) / self.std
        running = self.convs(torch.cat([normalised[image_index], masks], dim=1))
        pooled = []
        for level in merged[image_index].chunk(self.levels, dim=1):
            running = running + level
            pooled.append(self.pool(running, masks.to(running.dtype)))
        return self.projector(torch.stack(pooled).mean(dim=0))


def build_regions(settings: RegionSettings, vision: TokenGrid, llm_width: int) -> RegionEncoder | LevelRegionEncoder:
    """Builds the region encoder of the settings, over the map of the visual branch `vision`."""
    if settings.kind == "levels":
        return LevelRegionEncoder(vision.merged_width, llm_width, vision.patch_size, settings, BridgedVision.LEVELS)
    return RegionEncoder(vision.merged_width, llm_width, vision.patch_size, settings.channels)


def encode_in_parts(
    encoder: RegionEncoder | LevelRegionEncoder, images: Tensor, merged: Tensor, masks: Tensor, image_index: Tensor
) -> Tensor:
    """Embeddings [R, llm_width] as of the encoder, a few regions at a time: each has a copy of its image's features."""
    parts = zip(masks.split(AT_ONCE), image_index.split(AT_ONCE), strict=True)
    return torch.cat([encoder(images, merged, *part) for part in parts])
