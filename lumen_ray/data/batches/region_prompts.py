"""Visual prompts in the frame of the model input: stored ones, mapped by the augmentation, and ones drawn on
instances."""

from __future__ import annotations

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from lumen_ray.data.batches.transforms import (
    MIN_VISIBLE,
    Sample,
    clip_boxes,
    inverse_coefficients,
    map_boxes,
    map_points,
    visible_share,
)
from lumen_ray.structures import Region, Size
from lumen_ray.targets import MASK_STRIDE
from lumen_ray.trunk.regions import region_mask


def _region_box(region: dict) -> np.ndarray:
    """The box of a stored region, xyxy float64 [1, 4] in stored pixels; at least one pixel wide and high."""
    if region["mask"]:
        x, y, width, height = coco_mask.toBbox(region["mask"])
        low, high = np.array([x, y]), np.array([x + width, y + height])
    else:
        points = np.array(region["points"], np.float64).reshape(-1, 2)
        low, high = points.min(0), points.max(0)
    grow = np.maximum(1 - (high - low), 0) / 2
    return np.concatenate([low - grow, high + grow])[None]


def region_visible(region: dict, sample: Sample) -> bool:
    """Whether at least `MIN_VISIBLE` of a stored region's box is left in the (augmented) model input."""
    boxes = map_boxes(_region_box(region), sample.matrix)
    return bool(visible_share(boxes, sample.image.shape[:2])[0] >= MIN_VISIBLE)


def region_input(sample: Sample, region: dict) -> np.ndarray:
    """A stored region, visible in the (augmented) model input, as a binary mask of the input, uint8 [H, W]."""
    size = sample.image.shape[:2]
    if region["mask"]:
        mask = Image.fromarray(coco_mask.decode(region["mask"]) * 255)
        out = mask.transform(
            size[::-1], Image.Transform.AFFINE, inverse_coefficients(sample.matrix), Image.Resampling.BILINEAR
        )
        if (inside := np.asarray(out) > 127).any():
            return inside.astype(np.uint8)
        low, high = clip_boxes(map_boxes(_region_box(region), sample.matrix), size).reshape(2, 2)
        # smaller than a pixel of the input: its centre
        return region_mask(Region("point", size, (low + high)[None] / 2), size)
    points = map_points(np.array(region["points"], np.float64).reshape(-1, 2), sample.matrix)
    if region["kind"] == "box":
        points = map_boxes(_region_box(region), sample.matrix).reshape(2, 2)
    return region_mask(Region(region["kind"], size, clip_boxes(points, size)), size)


def drawn_box(box: np.ndarray, size: Size, rng: np.random.Generator, looseness: float = 0.1) -> Region:
    """A box xyxy, in pixels of the input, as a user might draw it: its sides are off by up to that share of it."""
    low, high = box[:2], box[2:]
    loose = np.stack([low, high]) + rng.uniform(-looseness, looseness, (2, 2)) * (high - low)
    low, high = clip_boxes(loose.reshape(1, 4), size).reshape(2, 2)
    return Region("box", size, np.stack([low, np.maximum(high, low + 1)]))


def drawn_region(mask: np.ndarray, box: np.ndarray, size: Size, rng: np.random.Generator) -> Region:
    """A random region as a user might draw it on an instance: `mask` bool [H/4, W/4], its cells, `box` xyxy in input
    pixels."""
    kind = ("box", "point", "scribble", "polygon")[int(rng.integers(4))]
    if mask.sum() < 2:
        kind = "point"
    if kind == "box":
        return drawn_box(box, size, rng)
    ys, xs = np.nonzero(mask)
    inside = (np.stack([xs, ys], 1) + 0.5) * MASK_STRIDE
    if kind == "polygon":  # the support points in 8 directions
        turns = np.arange(8) * np.pi / 4
        points = inside[np.argmax(inside @ np.stack([np.cos(turns), np.sin(turns)]), axis=0)]
    else:
        points = inside[rng.choice(len(inside), min(1 if kind == "point" else 4, len(inside)), replace=False)]
        points = points[np.argsort(points[:, 0])]
    return Region(kind, size, points.astype(np.float32))
