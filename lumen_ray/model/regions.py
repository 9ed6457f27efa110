"""Region encoder: a visual prompt (box, point, scribble, polygon, mask) becomes one LLM embedding.

VisionLLM v2, sec. 3.1: convolutions over image + binary mask give a map that is added to the vision features, which
are then pooled inside the mask and projected; the result replaces a `<region>` token.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lumen_ray.structures import Region, Size, as_size


def region_mask(region: Region, input_size: int | Size) -> np.ndarray:
    """The region as a binary mask of the model input, uint8 [H, W]; `input_size` is (H, W) or the side of a square.

    The image is scaled to fit and sits at the top left, as `transforms.fit` places it. Points and scribbles are drawn
    with a radius of 3 % of the input's longer side.
    """
    input_h, input_w = as_size(input_size)
    scale = min(input_h / region.size[0], input_w / region.size[1])
    canvas = Image.new("L", (input_w, input_h), 0)
    draw = ImageDraw.Draw(canvas)
    if region.kind == "mask":
        from pycocotools import mask as coco_mask  # here, because a model computes without it

        array = coco_mask.decode(region.rle)
        height, width = region.size
        scaled = Image.fromarray(array * 255).resize((max(1, round(width * scale)), max(1, round(height * scale))))
        canvas.paste(scaled, (0, 0))
        inside = np.asarray(canvas) > 127
        if array.any() and not inside.any():  # too small for a pixel of the input, but still a place
            y, x = np.nonzero(array)
            return region_mask(Region("point", region.size, np.array([[x.mean() + 0.5, y.mean() + 0.5]])), input_size)
        return inside.astype(np.uint8)
    points = [(float(x), float(y)) for x, y in region.points * scale]
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
        trimmed = self.patch_size // 4 * 4  # a patch of 14 pixels is read as 12: stride-4 cells must tile it
        if trimmed != self.patch_size:
            shape = tuple(side // self.patch_size * trimmed for side in images.shape[-2:])
            resize = {"size": shape, "mode": "bilinear", "align_corners": False}
            stacked = F.interpolate(torch.cat([images[image_index], masks], dim=1), **resize)
        else:
            stacked = torch.cat([images[image_index], masks], dim=1)
        features = merged[image_index] + self.convs(stacked)
        inside = F.adaptive_avg_pool2d(masks, features.shape[-2:])
        weight = inside / inside.sum(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return self.projector((features * weight).sum(dim=(2, 3)))
