"""Augmentation: maps an image and its boxes, masks, keypoints and regions into the model input.

The geometry of a sample (augmentation and the fit into the model input) is composed into one affine map, so an image
is resampled once. Maps are axis-aligned (scale, shift, flips, quarter turns), so boxes stay exact.

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

from lumen_ray.data.images import Picture, as_picture
from lumen_ray.input_size import SizeRule
from lumen_ray.recipe import AugmentSettings
from lumen_ray.structures import Size, as_size
from lumen_ray.targets import MASK_STRIDE, Frame

UNMOVED = 0.05  # an image is copied instead of resampled if no corner moves by more than this many pixels
MIN_VISIBLE = 0.3  # an instance is dropped if less than this share of its box is left
PAD_VALUE = 114  # grey of the padding, 0..255, and of inputs without an image


@dataclass
class Sample:
    """One image in the input frame. `image` uint8 [H, W, 3]; `boxes` float32 [N, 4], xyxy; `crowd` bool [N]; `masks`: N
    uint8 arrays [H/4, W/4], the covered share of each cell in 255ths, or None; `keypoints`: N float32 arrays [K, 3]
    (x, y, v) or None; `kept` int [N]: index of each instance in the row; `matrix` float64 [2, 3]: stored -> input
    pixels; `size`: (height, width) of the stored image; `colors` [3]: factors of brightness, contrast and
    saturation."""

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
        """(height, width) of the top left part of the input, beyond which there is only padding."""
        height, width = self.image.shape[:2]
        corners = map_boxes(np.array([[0.0, 0.0, self.size[1], self.size[0]]]), self.matrix)[0]
        return min(height, max(1.0, corners[3])), min(width, max(1.0, corners[2]))

    @property
    def extent(self) -> Size:
        """`visible` in whole pixels."""
        height, width = self.visible
        return math.ceil(height), math.ceil(width)

    @property
    def room(self) -> float:
        """The factor by which the image could be enlarged and still fit the input; 1 if it is not zoomed out."""
        whole = np.abs(self.matrix[::-1, :2]) @ self.size[::-1]
        return max(1.0, (self.image.shape[:2] / whole).min())


def fit(image: np.ndarray | Picture, input_size: int | Size) -> tuple[np.ndarray, Frame]:
    """Fits an image into the model input without augmentation, for inference: uint8 [h, w, 3] -> (uint8 [H, W, 3],
    scaled, at the top left, padded with `PAD_VALUE`; its frame)."""
    picture = as_picture(image)
    matrix = fit_matrix(picture.size, input_size)
    return warp(picture.pixels, matrix, input_size, reduction=picture.reduction), Frame.fit(picture.size, input_size)


def fit_matrix(size: Size, input_size: int | Size) -> np.ndarray:
    """The stored -> input map of `fit`, float64 [2, 3]."""
    scale = Frame.fit(size, input_size).scale
    return np.array([[scale, 0, 0], [0, scale, 0]], np.float64)


def draw_matrix(size: Size, input_size: int | Size, augment: AugmentSettings, rng: np.random.Generator) -> np.ndarray:
    """A random stored -> input map, float64 [2, 3]. Makes the same number of draws for all settings, so that runs stay
    comparable."""
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
    if zoom > 1:  # crop a random part of the enlarged image
        room = np.maximum([turned_w * scale - input_w, turned_h * scale - input_h], 0)
        place[:2, 2] -= rng.random(2) * room
    else:
        rng.random(2)
    return (place @ linear @ center)[:2]


def warp(
    image: np.ndarray, matrix: np.ndarray, input_size: int | Size, fill: int = PAD_VALUE, reduction: int = 1
) -> np.ndarray:
    """Resamples uint8 [h, w, 3] by a stored -> input map to uint8 [H, W, 3]; shrinks it with an area filter first.

    `fill`: value outside the image; `reduction`: by how much `image` is smaller than the stored one (`images.Picture`).
    """
    matrix = matrix * [reduction, reduction, 1]
    shape = as_size(input_size)[::-1]  # Pillow's (width, height)
    picture = Image.fromarray(image)
    scale = np.abs(matrix[:, :2]).sum(0)  # along the image's x and y
    if scale.min() < 1:  # antialias: sampling an image at every second pixel would drop thin structures
        small = [max(1, round(side * min(1, s))) for side, s in zip(picture.size, scale.tolist(), strict=True)]
        factor = np.array([picture.width / small[0], picture.height / small[1]])
        picture = picture.resize(small, Image.Resampling.BOX if scale.min() < 0.5 else Image.Resampling.BILINEAR)
        matrix = matrix * [*factor, 1]
    if (place := _whole_shift(picture.size, matrix)) is not None:
        canvas = Image.new("RGB", shape, (fill,) * 3)
        canvas.paste(picture, place)
        return np.asarray(canvas)
    out = picture.transform(
        shape,
        Image.Transform.AFFINE,
        inverse_coefficients(matrix),
        Image.Resampling.BILINEAR,
        fillcolor=(fill,) * 3,
    )
    return np.asarray(out)


def inverse_coefficients(matrix: np.ndarray) -> list[float]:
    """The inverse of an affine map [2, 3] as Pillow's 6 coefficients, which map output to input pixels."""
    return np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2].flatten().tolist()


def _whole_shift(shape: tuple[int, int], matrix: np.ndarray) -> tuple[int, int] | None:
    """The shift (x, y) in whole pixels, if the map does no more than shift an image of (width, height) `shape`."""
    corners = np.array([[0, 0], [shape[0], 0], [0, shape[1]], shape], np.float64)
    shift = np.round(matrix[:, 2])
    if np.abs(map_points(corners, matrix) - corners - shift).max() > UNMOVED:
        return None
    return int(shift[0]), int(shift[1])


def map_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Maps xy [..., 2]."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def map_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Maps xyxy [N, 4] by an axis-aligned map: the two mapped corners, sorted."""
    corners = map_points(boxes.reshape(-1, 2, 2).astype(np.float64), matrix)
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def mask_shape(input_size: int | Size) -> Size:
    """(height, width) of the masks of an input, at `MASK_STRIDE`."""
    height, width = as_size(input_size)
    return -(-height // MASK_STRIDE), -(-width // MASK_STRIDE)


def map_mask(rle: dict[str, Any], matrix: np.ndarray, input_size: int | Size) -> np.ndarray:
    """Maps an RLE of the stored image into the input: uint8 [H/4, W/4], the covered share of each cell in 255ths; where
    the input enlarges the image more than twice, of about two stored pixels."""
    small = matrix / MASK_STRIDE
    inverse = np.linalg.inv(np.vstack([small, [0, 0, 1]]))[:2]
    shape = mask_shape(input_size)[::-1]
    picture = Image.fromarray(coco_mask.decode(rle) * 255)
    # at twice the masks' resolution, a bilinear sample at the centre of a cell is the mean over the cell
    scale = 2 * np.sqrt(abs(np.linalg.det(small[:, :2])))
    if scale < 0.75:
        shrunk = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BOX
        )
        factor = np.diag([shrunk.width / picture.width, shrunk.height / picture.height])
        inverse = factor @ inverse
        picture = shrunk
    out = picture.transform(shape, Image.Transform.AFFINE, inverse.flatten().tolist(), Image.Resampling.BILINEAR)
    return np.array(out)


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
    """The source index of each keypoint of a mirrored object: names that differ only by left/right are exchanged."""
    place = {name.lower(): k for k, name in enumerate(names)}
    return tuple(place.get(_other_side(name.lower()), k) for k, name in enumerate(names))


def _other_side(name: str) -> str:
    """The name with the words left and right exchanged; `_` and digits delimit words (`upright` stays)."""
    other = {"left": "right", "right": "left"}
    return re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda found: other[found[1]], name)


def clip_boxes(boxes: np.ndarray, input_size: int | Size) -> np.ndarray:
    """Clips xyxy [..., 4] or xy [..., 2] to the input."""
    limit = as_size(input_size)[::-1] * (boxes.shape[-1] // 2)
    return np.clip(boxes, 0, limit)


def visible_share(boxes: np.ndarray, input_size: int | Size) -> np.ndarray:
    """The share of the area of each box [N, 4] (input frame, not clipped) that lies in the input: [N] in 0..1."""
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
    """Augments a shard row and its decoded image to a `Sample` in the input frame; drops instances cropped away.

    `skeletons`: keypoint names by class, whose left and right are exchanged if the image is mirrored.
    """
    picture = as_picture(image)
    matrix = draw_matrix(picture.size, input_size, augment, rng)
    boxes = map_boxes(_stored_boxes(row), matrix)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kept = np.flatnonzero((visible_share(boxes, input_size) >= MIN_VISIBLE) & (area > 4))
    return _map_sample(row, picture, matrix, input_size, kept, draw_colors(augment.color, rng), skeletons)


def resized(
    sample: Sample,
    row: dict[str, Any],
    image: np.ndarray | Picture,
    rule: SizeRule,
    skeletons: Mapping[str, Sequence[str]] | None = None,
) -> Sample:
    """The sample of `row` with the same instances in the size of a rule, resampled from `image`.

    Without the padding of the sample; an image that was zoomed out is smaller by the same factor.
    """
    size, scale = rule.fit(sample.visible, sample.room)
    matrix = np.diag(scale) @ sample.matrix
    return _map_sample(row, as_picture(image), matrix, size, sample.kept, sample.colors, skeletons)


def picture_of(sample: Sample, picture: Picture, rule: SizeRule) -> np.ndarray:
    """Maps `picture` like the sample's image, in the size of the rule: uint8 [h, w, 3], without annotations.

    It is the sample's image or one in its place, such as the target of an edit, which may have another size.
    """
    size, scale = rule.fit(sample.visible)
    resize = np.diag([sample.size[1] / picture.size[1], sample.size[0] / picture.size[0], 1.0])
    return warp(picture.pixels, np.diag(scale) @ sample.matrix @ resize, size, reduction=picture.reduction)


def _stored_boxes(row: dict[str, Any]) -> np.ndarray:
    return np.array([i["box"] for i in row["instances"] or []], np.float64).reshape(-1, 4)


def _map_sample(
    row: dict[str, Any],
    picture: Picture,
    matrix: np.ndarray,
    input_size: int | Size,
    kept: np.ndarray,
    colors: np.ndarray,
    skeletons: Mapping[str, Sequence[str]] | None,
) -> Sample:
    """Maps the image and the `kept` instances of the row by a stored -> input map."""
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
