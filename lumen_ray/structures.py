"""Typed results and annotations: modules exchange these, never bare coordinate arrays.

All coordinates are float32 absolute pixels of the image after EXIF rotation, x to the right, y down; boxes are `xyxy`
with the far edge exclusive (a 10x10 box at the origin is ``[0, 0, 10, 10]``). Sizes are (height, width). Conversions to
other conventions (COCO's xywh) happen only in the methods below and in exporters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from lumen_ray.errors import UserError, unknown

Size = tuple[int, int]  # (height, width)
Dtype = Literal["float32", "bfloat16"]  # arithmetic of a model at inference


def check_dtype(name: str) -> Dtype:
    """Returns `name`. Raises `UserError` if it is not one of `Dtype`."""
    if name not in get_args(Dtype):
        raise unknown("dtype", name, get_args(Dtype))
    return cast(Dtype, name)


def as_size(size: int | Size) -> Size:
    """(height, width) of a model input, pixels; a single number is the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def check_pixels(image: Any, what: str, reason: str) -> None:
    """Raises `UserError` unless `image` is a uint8 array [height, width, 3]. `what`: its name in the sentence."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return
    kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(
        f"{what} is a uint8 array [height, width, 3] (RGB), got {kind}; for a PIL image give "
        "np.asarray(image.convert('RGB'))",
        reason,
    )


def _check_size(size: Size) -> Size:
    height, width = int(size[0]), int(size[1])
    if height <= 0 or width <= 0:
        raise ValueError(f"image size must be positive (height, width), got {size}")
    return height, width


def _paste(crop: np.ndarray, x: int, y: int, size: Size) -> dict[str, Any]:
    """The COCO RLE of an image of `size` that is empty but for `crop` at (x, y). RLE counts down the columns."""
    height, width = size
    rows = crop.shape[0]
    columns = np.zeros((crop.shape[1], rows + 2), np.int8)
    columns[:, 1:-1] = crop.T
    steps = np.diff(columns, axis=1)  # 1 where a run starts, -1 behind its end
    column, row = np.nonzero(steps == 1)
    starts = (x + column) * height + y + row
    column, row = np.nonzero(steps == -1)
    ends = (x + column) * height + y + row
    apart = np.ones(len(starts) + 1, bool)
    apart[1:-1] = starts[1:] != ends[:-1]  # a run that reaches the bottom goes on at the top of the next column
    edges = np.stack([starts[apart[:-1]], ends[apart[1:]]], axis=1).reshape(-1)
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:  # the last run ends the image
        counts = counts[:-1]
    rle = _coco_mask().frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return _as_rle(rle)


def _as_rle(encoded: dict[str, Any]) -> dict[str, Any]:
    """An RLE of `pycocotools` in JSON types."""
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def _coco_mask() -> Any:
    """`pycocotools.mask`, imported on first use: running a model needs no pycocotools, e.g. on a bare GPU machine."""
    from pycocotools import mask

    return mask


@dataclass(init=False)
class Boxes:
    """`xyxy`: float32 [N, 4], absolute pixels; `size`: (height, width) of the image."""

    xyxy: np.ndarray
    size: Size

    def __init__(self, xyxy: ArrayLike, size: Size) -> None:
        self.xyxy = np.asarray(xyxy, dtype=np.float32).reshape(-1, 4)
        self.size = _check_size(size)

    @classmethod
    def from_xywh(cls, xywh: Any, size: Size) -> Boxes:
        """From COCO's (x, y, width, height) [N, 4] in pixels, computed in float64 before rounding to float32."""
        boxes = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
        return cls(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), size)

    def to_xywh(self) -> np.ndarray:
        """float64 [N, 4], COCO's (x, y, width, height) in pixels."""
        boxes = self.xyxy.astype(np.float64)
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

    @property
    def area(self) -> np.ndarray:
        """float32 [N], square pixels; 0 for inverted boxes."""
        wh = np.clip(self.xyxy[:, 2:] - self.xyxy[:, :2], 0, None)
        return wh[:, 0] * wh[:, 1]

    def clip(self) -> Boxes:
        """The boxes [N, 4] clipped to the image."""
        height, width = self.size
        limit = np.array([width, height, width, height], np.float32)
        return Boxes(np.clip(self.xyxy, 0, limit), self.size)

    def iou(self, other: Boxes) -> np.ndarray:
        """Intersection over union with M other boxes, float32 [N, M] in 0..1."""
        top_left = np.maximum(self.xyxy[:, None, :2], other.xyxy[None, :, :2])
        bottom_right = np.minimum(self.xyxy[:, None, 2:], other.xyxy[None, :, 2:])
        overlap = np.clip(bottom_right - top_left, 0, None).prod(-1)
        union = self.area[:, None] + other.area[None] - overlap
        return np.where(union > 0, overlap / np.maximum(union, 1e-9), 0).astype(np.float32)

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, index: Any) -> Boxes:
        return Boxes(self.xyxy[index], self.size)


@dataclass
class Masks:
    """Instance masks as COCO RLE: `rles` is N dicts ``{"size": [height, width], "counts": str}``, each of the whole
    image; `size`: its (height, width)."""

    rles: list[dict[str, Any]]
    size: Size

    def __post_init__(self) -> None:
        self.size = _check_size(self.size)

    @classmethod
    def from_arrays(cls, masks: np.ndarray, size: Size | None = None) -> Masks:
        """From bool [N, height, width]; `size`: (height, width), by default that of the array."""
        masks = np.asarray(masks)
        size = size or (masks.shape[1], masks.shape[2])
        if len(masks) == 0:
            return cls([], size)
        encoded = _coco_mask().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        return cls([_as_rle(rle) for rle in encoded], size)

    @classmethod
    def from_crops(cls, crops: Iterable[np.ndarray], corners: Iterable[tuple[int, int]], size: Size) -> Masks:
        """From parts of images of (height, width) `size`, which are empty elsewhere: bool [h, w] each, and the (x, y)
        of its top left pixel. Takes time by the size of the parts."""
        return cls([_paste(crop, x, y, size) for crop, (x, y) in zip(crops, corners, strict=True)], size)

    def to_arrays(self) -> np.ndarray:
        """The masks as bool [N, height, width]."""
        if not self.rles:
            return np.zeros((0, *self.size), bool)
        return _coco_mask().decode(self.rles).transpose(2, 0, 1).astype(bool)

    def union(self) -> Masks:
        """One mask: where any of them is."""
        return Masks([_as_rle(_coco_mask().merge(self.rles))], self.size)

    def iou(self, other: Masks) -> np.ndarray:
        """Intersection over union with M other masks, float32 [N, M] in 0..1."""
        if not len(self) or not len(other):
            return np.zeros((len(self), len(other)), np.float32)
        found = _coco_mask().iou(self.rles, other.rles, [False] * len(other))
        return np.asarray(found, np.float32).reshape(len(self), len(other))

    @property
    def area(self) -> np.ndarray:
        """float32 [N], number of pixels."""
        areas = _coco_mask().area(self.rles) if self.rles else []
        return np.asarray(areas, np.float32).reshape(-1)

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, index: Any) -> Masks:
        rles = self.rles[index] if isinstance(index, slice) else [self.rles[int(i)] for i in np.atleast_1d(index)]
        return Masks(rles, self.size)


@dataclass(init=False)
class Keypoints:
    """`xyv`: float32 [N, K, 3]; x, y in absolute pixels; v is COCO's visibility (0 unlabelled, 1 hidden, 2 visible) in
    annotations and a score in 0..1 in predictions. `names`: the K keypoint names; `size`: (height, width) of the image.
    """

    xyv: np.ndarray
    names: tuple[str, ...]
    size: Size

    def __init__(self, xyv: ArrayLike, names: Iterable[str], size: Size) -> None:
        self.names = tuple(names)
        self.xyv = np.asarray(xyv, dtype=np.float32).reshape(-1, len(self.names), 3)
        self.size = _check_size(size)

    def __len__(self) -> int:
        return len(self.xyv)

    def __getitem__(self, index: Any) -> Keypoints:
        return Keypoints(self.xyv[index], self.names, self.size)


REGION_KINDS = ("box", "point", "scribble", "polygon", "mask")


@dataclass(init=False)
class Region:
    """A visual prompt: `points` float32 [N, 2], x and y in absolute pixels (box: two corners; point: one; scribble and
    polygon: the vertices) or, for kind ``mask``, a COCO `rle`. `size`: (height, width) of the image.

    Raises `UserError` for an unknown kind, too few points, an empty box or points outside the image.
    """

    kind: str
    size: Size
    points: np.ndarray | None = None
    rle: dict[str, Any] | None = None

    def __init__(
        self, kind: str, size: Size, points: ArrayLike | None = None, rle: dict[str, Any] | None = None
    ) -> None:
        self.kind, self.size, self.rle, self.points = kind, _check_size(size), rle, None
        if kind not in REGION_KINDS:
            raise UserError(f"unknown region kind '{kind}'; kinds: {', '.join(REGION_KINDS)}", "unknown_region")
        if kind == "mask":
            self._check_mask()
        else:
            self.points = np.asarray([] if points is None else points, np.float32).reshape(-1, 2)
            self._check_points(self.points)

    def _check_mask(self) -> None:
        if self.rle is None:
            raise UserError("a mask region needs an RLE of the image's size", "invalid_region")
        if list(self.rle["size"]) != list(self.size):
            raise UserError(
                f"the mask region is {self.rle['size']} but the image is {list(self.size)} (height, width)",
                "invalid_region",
            )

    def _check_points(self, points: np.ndarray) -> None:
        needed = {"box": 2, "point": 1, "scribble": 2, "polygon": 3}[self.kind]
        if len(points) < needed:
            raise UserError(
                f"a {self.kind} region needs at least {needed} point(s) [x, y], got {len(points)}", "invalid_region"
            )
        height, width = self.size
        x, y = points[:, 0], points[:, 1]
        inside = np.isfinite(points).all(1) & (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
        if not inside.all():
            raise UserError(
                f"{self.kind} region {points.tolist()} lies outside the image of {width}x{height} pixels; "
                f"give x in 0..{width} and y in 0..{height}",
                "region_outside_image",
            )
        if self.kind == "box" and ((points[1] - points[0]) <= 0).any():
            raise UserError(f"box region {points.tolist()} is empty; give x1 < x2 and y1 < y2", "invalid_region")


@dataclass(init=False)
class Prediction:
    """All instances of one phrase in one image, best score first.

    `boxes`: N boxes; `scores`: float32 [N] in 0..1; `masks` and `keypoints`: N each, None if the task has none. All in
    pixels of the EXIF-rotated image. `marks`: further numbers of each instance, float32 [N] in 0..1, by the column of
    the label table that they belong in: "presence", "verified", "agreement".
    """

    phrase: str
    boxes: Boxes
    scores: np.ndarray
    masks: Masks | None = None
    keypoints: Keypoints | None = None
    marks: dict[str, np.ndarray] = field(default_factory=dict)

    def __init__(
        self,
        phrase: str,
        boxes: Boxes,
        scores: ArrayLike,
        masks: Masks | None = None,
        keypoints: Keypoints | None = None,
        marks: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        self.phrase, self.boxes, self.masks, self.keypoints = phrase, boxes, masks, keypoints
        self.scores = np.asarray(scores, np.float32).reshape(-1)
        self.marks = {name: np.asarray(values, np.float32).reshape(-1) for name, values in (marks or {}).items()}
        assert all(len(values) == len(self.boxes) for values in (self.scores, *self.marks.values()))

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> Prediction:
        return Prediction(
            self.phrase,
            self.boxes[index],
            self.scores[index],
            None if self.masks is None else self.masks[np.arange(len(self))[index]],
            None if self.keypoints is None else self.keypoints[index],
            {name: values[index] for name, values in self.marks.items()},
        )

    def marked(self, **marks: ArrayLike) -> Prediction:
        """The instances with more `marks`, [N] each."""
        more = {name: np.asarray(values, np.float32) for name, values in marks.items()}
        return replace(self, marks=self.marks | more)

    def above(self, threshold: float) -> Prediction:
        """The instances with a score of at least `threshold`."""
        return self[np.flatnonzero(self.scores >= threshold)]


@dataclass(frozen=True)
class SampleSettings:
    """How a diffusion decoder samples images. An image depends on `seed` and its prompt, not on others in the batch."""

    steps: int = 30  # of the scheduler
    guidance: float | None = None  # guidance scale of the text; None: the decoder's setting
    image_guidance: float | None = None  # editing only: guidance scale of the input image; None: the decoder's setting
    seed: int = 0
    size: Size | None = None  # (height, width) in pixels; None: the decoder's setting
    num_images: int = 1  # per prompt
    batch_size: int = 4  # images sampled at once, to bound memory
