"""Image and annotations through one geometric map: boxes, masks, keypoints and regions follow every transform.

All geometry of a sample (augmentation and the fit into the model input) is composed into one affine map, so an image
is resampled once. Only axis-aligned maps are drawn (scale, shift, flips, quarter turns): boxes stay exact.

Frames: *stored* = the EXIF-rotated image; *input* = the model input of (height, width) `input_size`, pixels, xyxy; a
single number is the side of a square.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from pycocotools import mask as coco_mask

from lumen_ray.data.images import Picture
from lumen_ray.input_size import SizeRule
from lumen_ray.recipe import AugmentSettings
from lumen_ray.structures import Size, as_size
from lumen_ray.targets import MASK_STRIDE, Frame

UNMOVED = 0.05  # pixels that no corner may be away from its place for an image to be copied instead of resampled
MIN_VISIBLE = 0.3  # an instance cropped to less of its box is dropped


@dataclass
class Sample:
    """One image in the input frame. `boxes` float32 [N, 4]; `crowd` bool [N]; `masks`: N uint8 arrays [H/4, W/4] or
    None; `keypoints`: N float32 arrays [K, 3] or None; `kept` int [N]: the row's instance each one was; `matrix`
    [2, 3]: stored -> input pixels; `size`: (height, width) of the stored image; `colors` [3]: what its brightness,
    contrast and saturation were multiplied by."""

    image: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    masks: list[np.ndarray | None]
    keypoints: list[np.ndarray | None]
    kept: np.ndarray
    matrix: np.ndarray
    size: Size
    colors: np.ndarray = field(default_factory=lambda: np.ones(3))

    @property
    def visible(self) -> tuple[float, float]:
        """(height, width) of the part at the top left of the input beyond which there is only padding."""
        height, width = self.image.shape[:2]
        corners = map_boxes(np.array([[0.0, 0.0, self.size[1], self.size[0]]]), self.matrix)[0]
        return min(height, max(1.0, corners[3])), min(width, max(1.0, corners[2]))

    @property
    def extent(self) -> Size:
        """`visible` in whole pixels."""
        return tuple(math.ceil(side) for side in self.visible)

    @property
    def room(self) -> float:
        """How many times larger the image would fit into the input than it is; 1 where it is not zoomed out."""
        whole = np.abs(self.matrix[::-1, :2]) @ self.size[::-1]
        return max(1.0, (self.image.shape[:2] / whole).min())


def fit(image: np.ndarray, input_size: int | Size) -> tuple[np.ndarray, Frame]:
    """uint8 [h, w, 3] -> (uint8 [H, W, 3] scaled to the top left and padded with grey, its frame). For inference."""
    frame = Frame.fit(image.shape[:2], input_size)
    return warp(image, fit_matrix(image.shape[:2], input_size), input_size), frame


def fit_matrix(size: Size, input_size: int | Size) -> np.ndarray:
    scale = Frame.fit(size, input_size).scale
    return np.array([[scale, 0, 0], [0, scale, 0]], np.float64)


def draw_matrix(size: Size, input_size: int | Size, augment: AugmentSettings, rng: np.random.Generator) -> np.ndarray:
    """A random stored -> input map. The same number of random draws whatever the settings, so runs stay comparable."""
    height, width = size
    input_h, input_w = as_size(input_size)
    flip_x, flip_y, turn = rng.random() < 0.5, rng.random() < 0.5, int(rng.integers(4))
    zoom = np.exp(rng.uniform(*np.log(augment.scale)))
    shift_x, shift_y = rng.uniform(-augment.shift, augment.shift, 2) * [input_w, input_h]
    center = np.eye(3)
    center[:2, 2] = [-width / 2, -height / 2]
    linear = np.eye(3)
    if augment.flip_x and flip_x:
        linear = np.diag([-1.0, 1, 1]) @ linear
    if augment.flip_y and flip_y:
        linear = np.diag([1.0, -1, 1]) @ linear
    if input_h != input_w:
        turn *= 2  # a quarter turn would leave much of the input empty
    for _ in range(turn if augment.turn else 0):
        linear = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ linear
    turned_w, turned_h = np.abs(linear[:2, :2]) @ [width, height]
    scale = min(input_h / turned_h, input_w / turned_w) * zoom
    place = np.diag([scale, scale, 1])
    # without zoom and shift the image sits at the top left, where `fit` puts it
    place[:2, 2] = [turned_w * scale / 2 + shift_x, turned_h * scale / 2 + shift_y]
    if zoom > 1:  # look at a random part of the enlarged image
        room = np.maximum([turned_w * scale - input_w, turned_h * scale - input_h], 0)
        place[:2, 2] -= rng.random(2) * room
    else:
        rng.random(2)
    return (place @ linear @ center)[:2]


def warp(
    image: np.ndarray, matrix: np.ndarray, input_size: int | Size, fill: int = 114, reduction: int = 1
) -> np.ndarray:
    """uint8 [h, w, 3] through a stored -> input map -> uint8 [H, W, 3]. Shrinks with an area filter first.

    `reduction`: how many times smaller than the stored image `image` is (see `images.Picture`).
    """
    matrix = matrix * [reduction, reduction, 1]
    shape = as_size(input_size)[::-1]  # Pillow's (width, height)
    picture = Image.fromarray(image)
    scale = np.abs(matrix[:, :2]).sum(0)  # along the picture's own x and y
    if scale.min() < 1:  # antialias: sampling an image at every second pixel would drop thin structures
        small = [max(1, round(side * min(1, s))) for side, s in zip(picture.size, scale.tolist(), strict=True)]
        factor = np.array([picture.width / small[0], picture.height / small[1]])
        picture = picture.resize(small, Image.Resampling.BOX if scale.min() < 0.5 else Image.Resampling.BILINEAR)
        matrix = matrix * [*factor, 1]
    if (place := _whole_shift(picture.size, matrix)) is not None:
        canvas = Image.new("RGB", shape, (fill,) * 3)
        canvas.paste(picture, place)
        return np.asarray(canvas)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    out = picture.transform(
        shape,
        Image.Transform.AFFINE,
        inverse.flatten(),
        Image.Resampling.BILINEAR,
        fillcolor=(fill,) * 3,
    )
    return np.asarray(out)


def _whole_shift(shape: tuple[int, int], matrix: np.ndarray) -> tuple[int, int] | None:
    """(x, y) in whole pixels when the map does nothing to an image of (width, height) `shape` but shift it."""
    corners = np.array([[0, 0], [shape[0], 0], [0, shape[1]], shape], np.float64)
    shift = np.round(matrix[:, 2])
    if np.abs(map_points(corners, matrix) - corners - shift).max() > UNMOVED:
        return None
    return int(shift[0]), int(shift[1])


def map_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """xy [..., 2] through the map."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def map_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """xyxy [N, 4] through an axis-aligned map: the two mapped corners, put in order again."""
    corners = map_points(boxes.reshape(-1, 2, 2).astype(np.float64), matrix)
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def mask_shape(input_size: int | Size) -> Size:
    """(height, width) of the masks of an input."""
    height, width = as_size(input_size)
    return -(-height // MASK_STRIDE), -(-width // MASK_STRIDE)


def map_mask(rle: dict[str, Any], matrix: np.ndarray, input_size: int | Size) -> np.ndarray:
    """An RLE of the stored image -> uint8 [H/4, W/4] of the input at the masks' stride."""
    small = matrix / MASK_STRIDE
    inverse = np.linalg.inv(np.vstack([small, [0, 0, 1]]))[:2]
    shape = mask_shape(input_size)[::-1]
    picture = Image.fromarray(coco_mask.decode(rle) * 255)
    # twice the masks' resolution: sampled bilinearly at the middle of a cell, that is the mean over the cell
    scale = 2 * np.sqrt(abs(np.linalg.det(small[:, :2])))
    if scale < 0.75:
        shrunk = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BOX
        )
        factor = np.diag([shrunk.width / picture.width, shrunk.height / picture.height])
        inverse = factor @ inverse
        picture = shrunk
    out = picture.transform(shape, Image.Transform.AFFINE, inverse.flatten(), Image.Resampling.BILINEAR)
    return (np.asarray(out) > 127).astype(np.uint8)


def draw_colors(strength: float, rng: np.random.Generator) -> np.ndarray:
    """Factors [3] of brightness, contrast and saturation, each in 1 +- strength / 2."""
    return 1 + rng.uniform(-0.5, 0.5, 3) * strength


def change_colors(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with brightness, contrast and saturation multiplied by `factors` [3]."""
    if (factors == 1).all():
        return image
    picture = Image.fromarray(image)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        picture = enhance(picture).enhance(factor)
    return np.asarray(picture)


@lru_cache(maxsize=256)
def mirror_order(names: tuple[str, ...]) -> tuple[int, ...]:
    """Where each keypoint of a mirrored object is taken from: names that differ only by left/right change places."""
    place = {name.lower(): k for k, name in enumerate(names)}
    return tuple(place.get(_other_side(name.lower()), k) for k, name in enumerate(names))


def _other_side(name: str) -> str:
    """The name with the words left and right exchanged; `_` and digits end a word, letters do not (`upright`)."""
    other = {"left": "right", "right": "left"}
    return re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda found: other[found[1]], name)


def clip_boxes(boxes: np.ndarray, input_size: int | Size) -> np.ndarray:
    """xyxy [..., 4] or xy [..., 2] cut off at the borders of the input."""
    limit = as_size(input_size)[::-1] * (boxes.shape[-1] // 2)
    return np.clip(boxes, 0, limit)


def visible_share(boxes: np.ndarray, input_size: int | Size) -> np.ndarray:
    """How much of each box [N, 4] (input frame, not clipped) lies inside the input, by area: [N] in 0..1."""
    clipped = clip_boxes(boxes, input_size)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return np.prod(clipped[:, 2:] - clipped[:, :2], axis=1) / np.maximum(area, 1e-6)


def transform(
    row: dict[str, Any],
    image: np.ndarray | Picture,
    input_size: int | Size,
    augment: AugmentSettings,
    rng: np.random.Generator,
    skeletons: Mapping[str, Sequence[str]] | None = None,
) -> Sample:
    """A shard row and its decoded image -> a `Sample` in the input frame; instances cropped away are dropped.

    `skeletons`: keypoint names by class; where the image is mirrored, left and right ones of them are exchanged.
    """
    picture = as_picture(image)
    matrix = draw_matrix(picture.size, input_size, augment, rng)
    boxes = map_boxes(_stored_boxes(row), matrix)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kept = np.flatnonzero((visible_share(boxes, input_size) >= MIN_VISIBLE) & (area > 4))
    return _placed(row, picture, matrix, input_size, kept, draw_colors(augment.color, rng), skeletons)


def resized(
    sample: Sample,
    row: dict[str, Any],
    image: np.ndarray | Picture,
    rule: SizeRule,
    skeletons: Mapping[str, Sequence[str]] | None = None,
) -> Sample:
    """What a sample of `row` shows, with the same instances, in the size that a rule gives it, resampled from `image`.

    Its input ends where the sample's own has nothing but padding. An image that was zoomed out is smaller by as much.
    """
    size, scale = rule.fit(sample.visible, sample.room)
    return _placed(row, as_picture(image), np.diag(scale) @ sample.matrix, size, sample.kept, sample.colors, skeletons)


def picture_of(sample: Sample, picture: Picture, rule: SizeRule) -> np.ndarray:
    """uint8 [h, w, 3]: what a sample shows, of its own picture or of one in its place that may have another size, in
    the size that the rule gives it."""
    size, scale = rule.fit(sample.visible)
    own = np.diag([sample.size[1] / picture.size[1], sample.size[0] / picture.size[0], 1.0])
    return warp(picture.pixels, np.diag(scale) @ sample.matrix @ own, size, reduction=picture.reduction)


def as_picture(image: np.ndarray | Picture) -> Picture:
    return image if isinstance(image, Picture) else Picture(image, image.shape[:2])


def _stored_boxes(row: dict[str, Any]) -> np.ndarray:
    return np.array([i["box"] for i in row["instances"] or []], np.float64).reshape(-1, 4)


def _placed(
    row: dict[str, Any],
    picture: Picture,
    matrix: np.ndarray,
    input_size: int | Size,
    kept: np.ndarray,
    colors: np.ndarray,
    skeletons: Mapping[str, Sequence[str]] | None,
) -> Sample:
    """The picture, and those instances of the row that are `kept`, through a stored -> input map."""
    pixels = change_colors(warp(picture.pixels, matrix, input_size, reduction=picture.reduction), colors)
    instances, boxes = row["instances"] or [], map_boxes(_stored_boxes(row), matrix)
    mirrored = np.linalg.det(matrix[:, :2]) < 0
    masks, keypoints = [], []
    for i in kept:
        rle, flat = instances[i]["mask"], instances[i]["keypoints"]
        masks.append(map_mask(rle, matrix, input_size) if rle else None)
        points = _map_keypoints(flat, matrix, input_size) if flat else None
        if points is not None and mirrored and (names := (skeletons or {}).get(instances[i]["phrase"])):
            points = points[list(mirror_order(tuple(names)))]
        keypoints.append(points)
    crowd = np.array([bool(instances[i]["crowd"]) for i in kept], bool)
    clipped = clip_boxes(boxes[kept], input_size).astype(np.float32)
    return Sample(pixels, clipped, crowd, masks, keypoints, kept, matrix, picture.size, colors)


def _map_keypoints(flat: list[float], matrix: np.ndarray, input_size: int | Size) -> np.ndarray:
    """float32 [K, 3]; keypoints outside the input become unlabelled."""
    points = np.array(flat, np.float64).reshape(-1, 3)
    points[:, :2] = map_points(points[:, :2], matrix)
    outside = ((points[:, :2] < 0) | (points[:, :2] > as_size(input_size)[::-1])).any(1)
    points[outside, 2] = 0
    return points.astype(np.float32)
