"""Typed results and annotations. Every border of the system passes these, never bare coordinate arrays.

Frame of all coordinates: absolute pixels of the image after EXIF rotation, x to the right, y down, float32;
boxes are `xyxy` with the far edge exclusive (a 10x10 box at the origin is ``[0, 0, 10, 10]``).
Conversions to other conventions (COCO's xywh) happen only in the methods below and in exporters.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from lumen_ray.errors import UserError, unknown

Size = tuple[int, int]  # (height, width)
Dtype = Literal["float32", "bfloat16"]  # of the arithmetic of a model that answers


def check_dtype(name: str) -> Dtype:
    """`UserError` for a name that is none of `Dtype`."""
    if name not in get_args(Dtype):
        raise unknown("dtype", name, get_args(Dtype))
    return name


def as_size(size: int | Size) -> Size:
    """(height, width) of a model input; a single number is the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _check_size(size: Size) -> Size:
    height, width = int(size[0]), int(size[1])
    if height <= 0 or width <= 0:
        raise ValueError(f"image size must be positive (height, width), got {size}")
    return height, width


def _coco_mask() -> Any:
    """pycocotools' masks, imported on first use: a model computes without them, as on a bare GPU machine."""
    from pycocotools import mask

    return mask


@dataclass
class Boxes:
    """`xyxy`: float32 [N, 4], absolute pixels; `size`: (height, width) of the image they lie in."""

    xyxy: np.ndarray
    size: Size

    def __post_init__(self) -> None:
        self.xyxy = np.asarray(self.xyxy, dtype=np.float32).reshape(-1, 4)
        self.size = _check_size(self.size)

    @classmethod
    def from_xywh(cls, xywh: Any, size: Size) -> Boxes:
        """From COCO's (x, y, width, height), computed in float64 before rounding to float32."""
        boxes = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
        return cls(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), size)

    def to_xywh(self) -> np.ndarray:
        """float64 [N, 4] in COCO's (x, y, width, height)."""
        boxes = self.xyxy.astype(np.float64)
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

    @property
    def area(self) -> np.ndarray:
        """float32 [N], square pixels; 0 for inverted boxes."""
        wh = np.clip(self.xyxy[:, 2:] - self.xyxy[:, :2], 0, None)
        return wh[:, 0] * wh[:, 1]

    def clip(self) -> Boxes:
        """Clipped to the image."""
        height, width = self.size
        limit = np.array([width, height, width, height], np.float32)
        return Boxes(np.clip(self.xyxy, 0, limit), self.size)

    def iou(self, other: Boxes) -> np.ndarray:
        """Intersection over union, float32 [N, M]."""
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
    """Instance masks as COCO RLE: `rles` is N dicts ``{"size": [height, width], "counts": str}``."""

    rles: list[dict[str, Any]]
    size: Size

    def __post_init__(self) -> None:
        self.size = _check_size(self.size)

    @classmethod
    def from_arrays(cls, masks: np.ndarray, size: Size | None = None) -> Masks:
        """From bool [N, height, width]."""
        masks = np.asarray(masks)
        size = size or masks.shape[1:]
        if len(masks) == 0:
            return cls([], size)
        encoded = _coco_mask().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        return cls([{"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode()} for rle in encoded], size)

    def to_arrays(self) -> np.ndarray:
        """bool [N, height, width]."""
        if not self.rles:
            return np.zeros((0, *self.size), bool)
        return _coco_mask().decode(self.rles).transpose(2, 0, 1).astype(bool)

    @property
    def area(self) -> np.ndarray:
        """float32 [N], pixels."""
        areas = _coco_mask().area(self.rles) if self.rles else []
        return np.asarray(areas, np.float32).reshape(-1)

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, index: Any) -> Masks:
        rles = self.rles[index] if isinstance(index, slice) else [self.rles[int(i)] for i in np.atleast_1d(index)]
        return Masks(rles, self.size)


@dataclass
class Keypoints:
    """`xyv`: float32 [N, K, 3]; x, y in absolute pixels; `v` is COCO's visibility (0 unlabelled, 1 hidden, 2 visible)
    in annotations and a score in 0..1 in predictions. `names`: the K keypoint names."""

    xyv: np.ndarray
    names: tuple[str, ...]
    size: Size

    def __post_init__(self) -> None:
        self.names = tuple(self.names)
        self.xyv = np.asarray(self.xyv, dtype=np.float32).reshape(-1, len(self.names), 3)
        self.size = _check_size(self.size)

    def __len__(self) -> int:
        return len(self.xyv)

    def __getitem__(self, index: Any) -> Keypoints:
        return Keypoints(self.xyv[index], self.names, self.size)


REGION_KINDS = ("box", "point", "scribble", "polygon", "mask")


@dataclass
class Region:
    """A visual prompt: `points` float32 [N, 2] xy pixels (box: its two corners; point: one; scribble and polygon: the
    vertices) or, for kind ``mask``, an RLE. `size` is the image's (height, width)."""

    kind: str
    size: Size
    points: np.ndarray | None = None
    rle: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.size = _check_size(self.size)
        if self.kind not in REGION_KINDS:
            raise UserError(f"unknown region kind '{self.kind}'; kinds: {', '.join(REGION_KINDS)}", "unknown_region")
        if self.kind == "mask":
            if self.rle is None:
                raise UserError("a mask region needs an RLE of the image's size", "invalid_region")
            if list(self.rle["size"]) != list(self.size):
                raise UserError(
                    f"the mask region is {self.rle['size']} but the image is {list(self.size)} (height, width)",
                    "invalid_region",
                )
            return
        self.points = np.asarray(self.points if self.points is not None else [], np.float32).reshape(-1, 2)
        needed = {"box": 2, "point": 1, "scribble": 2, "polygon": 3}[self.kind]
        if len(self.points) < needed:
            raise UserError(
                f"a {self.kind} region needs at least {needed} point(s) [x, y], got {len(self.points)}",
                "invalid_region",
            )
        height, width = self.size
        x, y = self.points[:, 0], self.points[:, 1]
        if (
            not np.isfinite(self.points).all()
            or (x < 0).any()
            or (y < 0).any()
            or (x > width).any()
            or (y > height).any()
        ):
            raise UserError(
                f"{self.kind} region {self.points.tolist()} lies outside the image of {width}x{height} pixels; "
                f"give x in 0..{width} and y in 0..{height}",
                "region_outside_image",
            )
        if self.kind == "box" and ((self.points[1] - self.points[0]) <= 0).any():
            raise UserError(f"box region {self.points.tolist()} is empty; give x1 < x2 and y1 < y2", "invalid_region")


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 [h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """uint8 [h, w, 3] of what `encode_png` wrote."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()


@dataclass
class Prediction:
    """All instances found for one phrase of one image, best score first.

    `scores`: float32 [N] in 0..1. `masks` and `keypoints` are None where the task does not ask for them.
    """

    phrase: str
    boxes: Boxes
    scores: np.ndarray
    masks: Masks | None = None
    keypoints: Keypoints | None = None

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, np.float32).reshape(-1)
        assert len(self.scores) == len(self.boxes)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> Prediction:
        return Prediction(
            self.phrase,
            self.boxes[index],
            self.scores[index],
            None if self.masks is None else self.masks[np.arange(len(self))[index]],
            None if self.keypoints is None else self.keypoints[index],
        )

    def above(self, threshold: float) -> Prediction:
        """The instances with at least that score."""
        return self[np.flatnonzero(self.scores >= threshold)]


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn. A prompt's picture depends on `seed` and the prompt, not on what is drawn beside it."""

    steps: int = 30  # of the scheduler
    guidance: float | None = None  # how strictly the text is followed; None: as the decoder's settings say
    image_guidance: float | None = None  # editing only: how much of the picture is kept; None: as they say
    seed: int = 0
    size: Size | None = None  # (height, width) in pixels; None: the decoder's own
    num_images: int = 1  # per prompt
    batch_size: int = 4  # pictures drawn at once, to bound memory


@dataclass
class Answer:
    """What one `Request` about one image got: text, or one `Prediction` per phrase asked, in the order asked."""

    task: str
    size: Size
    predictions: list[Prediction] = field(default_factory=list)
    text: str | None = None
    #: routing token the LLM chose (free chat) or that the request forced; None for text
    route: str | None = None
    #: pictures made for it, uint8 [h, w, 3] RGB each
    images: list[np.ndarray] | None = None

    def best(self, most: int) -> Answer:
        """The answer with the `most` best-scored instances of all its phrases; equal scores in phrase order."""
        scores = np.concatenate([p.scores for p in self.predictions]) if self.predictions else np.zeros(0)
        if len(scores) <= most:
            return self
        kept = np.zeros(len(scores), bool)
        kept[np.argsort(-scores, kind="stable")[:most]] = True
        parts = np.split(kept, np.cumsum([len(p) for p in self.predictions])[:-1])
        chosen = [p[np.flatnonzero(part)] for p, part in zip(self.predictions, parts, strict=True)]
        return replace(self, predictions=chosen)

    @property
    def counts(self) -> dict[str, int]:
        """Instances per phrase (task `count`; threshold the predictions first)."""
        return {p.phrase: len(p) for p in self.predictions}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: boxes as xyxy pixel lists, masks as RLE, keypoints as [[x, y, score], ...], pictures as PNG
        in base64."""
        instances = []
        for p in self.predictions:
            for i in range(len(p)):
                item: dict[str, Any] = {
                    "phrase": p.phrase,
                    "score": round(float(p.scores[i]), 5),
                    "box": [round(float(c), 2) for c in p.boxes.xyxy[i]],
                }
                if p.masks is not None:
                    item["mask"] = p.masks.rles[i]
                if p.keypoints is not None:
                    item["keypoints"] = {
                        name: [round(float(c), 3) for c in p.keypoints.xyv[i, k]]
                        for k, name in enumerate(p.keypoints.names)
                    }
                instances.append(item)
        out: dict[str, Any] = {"task": self.task, "height": self.size[0], "width": self.size[1]}
        if self.route is not None:
            out["route"] = self.route
        if self.text is not None:
            out["text"] = self.text
        if self.task == "count":
            out["counts"] = self.counts
        if self.images is not None:
            out["images"] = [base64.b64encode(encode_png(image)).decode() for image in self.images]
        elif self.text is None:
            out["phrases"] = [p.phrase for p in self.predictions]
            out["instances"] = instances
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answer:
        """The inverse of `to_dict`, for clients that want to draw or score what a server sent."""
        size = (int(data["height"]), int(data["width"]))
        instances = data.get("instances") or []
        phrases = list(dict.fromkeys([*(data.get("phrases") or []), *(i["phrase"] for i in instances)]))
        predictions = []
        for phrase in phrases:
            members = [i for i in instances if i["phrase"] == phrase]
            masks = keypoints = None
            if members and members[0].get("mask"):
                masks = Masks([i["mask"] for i in members], size)
            if members and members[0].get("keypoints"):
                names = tuple(members[0]["keypoints"])
                keypoints = Keypoints([[i["keypoints"][n] for n in names] for i in members], names, size)
            boxes = Boxes([i["box"] for i in members], size)
            predictions.append(Prediction(phrase, boxes, [i["score"] for i in members], masks, keypoints))
        pictures = data.get("images")
        images = None if pictures is None else [decode_png(base64.b64decode(text)) for text in pictures]
        return cls(data["task"], size, predictions, data.get("text"), data.get("route"), images)
