"""Typed results and annotations: modules exchange these, never bare coordinate arrays.

All coordinates are float32 absolute pixels of the image after EXIF rotation, x to the right, y down; boxes are `xyxy`
with the far edge exclusive (a 10x10 box at the origin is ``[0, 0, 10, 10]``). Sizes are (height, width). Conversions to
other conventions (COCO's xywh) happen only in the methods below and in exporters.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from lumen_ray.errors import UserError, unknown
from lumen_ray.tasks import TASKS, task_of_route

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


def _check_size(size: Size) -> Size:
    height, width = int(size[0]), int(size[1])
    if height <= 0 or width <= 0:
        raise ValueError(f"image size must be positive (height, width), got {size}")
    return height, width


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
        return cls([{"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode()} for rle in encoded], size)

    def to_arrays(self) -> np.ndarray:
        """The masks as bool [N, height, width]."""
        if not self.rles:
            return np.zeros((0, *self.size), bool)
        return _coco_mask().decode(self.rles).transpose(2, 0, 1).astype(bool)

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


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of an image, uint8 [h, w, 3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The image, uint8 [h, w, 3] RGB, of bytes from `encode_png`."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()


@dataclass(init=False)
class Prediction:
    """All instances of one phrase in one image, best score first.

    `boxes`: N boxes; `scores`: float32 [N] in 0..1; `masks` and `keypoints`: N each, None if the task has none. All in
    pixels of the EXIF-rotated image.
    """

    phrase: str
    boxes: Boxes
    scores: np.ndarray
    masks: Masks | None = None
    keypoints: Keypoints | None = None

    def __init__(
        self,
        phrase: str,
        boxes: Boxes,
        scores: ArrayLike,
        masks: Masks | None = None,
        keypoints: Keypoints | None = None,
    ) -> None:
        self.phrase, self.boxes, self.masks, self.keypoints = phrase, boxes, masks, keypoints
        self.scores = np.asarray(scores, np.float32).reshape(-1)
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


@dataclass
class AnswerPart:
    """A piece of text, or the instances of the phrase that ends the text before it: `prediction`, with the `route` by
    which the LLM asked for them."""

    text: str = ""
    route: str | None = None
    prediction: Prediction | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; see `Answer.to_dict`."""
        if self.route is None or self.prediction is None:
            return {"type": "text", "text": self.text}
        found = _instances(self.prediction)
        task = task_of_route(self.route).name
        return {"type": "instances", "task": task, "phrase": self.prediction.phrase, "instances": found}

    @classmethod
    def from_dict(cls, data: dict[str, Any], size: Size) -> AnswerPart:
        """The inverse of `to_dict`; `size`: (height, width) of the image."""
        if data["type"] == "text":
            return cls(data["text"])
        route = TASKS[data["task"]].routing_token
        return cls(route=route, prediction=_prediction(data["phrase"], data["instances"], size))


@dataclass
class Answer:
    """The result of one `Request` about one image: text, images, or one `Prediction` per phrase in the request's order.

    `size`: (height, width) of the EXIF-rotated image, in whose pixels all coordinates are.
    """

    task: str
    size: Size
    predictions: list[Prediction] = field(default_factory=list)
    #: what the LLM wrote; in a routed answer without `parts` before its routing token
    text: str | None = None
    #: routing token that the LLM chose (free chat; of several the first) or the request forced; None for text
    route: str | None = None
    #: generated or edited images, uint8 [h, w, 3] RGB each
    images: list[np.ndarray] | None = None
    #: of the tokens of `text`, without the end token: natural logarithms of their probabilities by the LLM
    log_probs: list[float] | None = None
    #: the text of each of these tokens (`LumenTokenizer.token_texts`)
    tokens: list[str] | None = None
    #: whether the text is as long as it may be, though the LLM did not end it
    is_cut: bool = False
    #: of a text with instances in it, both in the order of writing: the texts joined are `text`, the predictions are
    #: `predictions`; None for other answers
    parts: list[AnswerPart] | None = None

    def with_predictions(self, predictions: list[Prediction]) -> Answer:
        """The answer with as many other predictions, in its parts too."""
        if self.parts is None:
            return replace(self, predictions=predictions)
        following = iter(predictions)
        parts = [p if p.prediction is None else replace(p, prediction=next(following)) for p in self.parts]
        return replace(self, predictions=predictions, parts=parts)

    def best(self, most: int) -> Answer:
        """The answer reduced to the `most` instances with the highest scores over all phrases; ties in phrase order."""
        scores = np.concatenate([p.scores for p in self.predictions]) if self.predictions else np.zeros(0)
        if len(scores) <= most:
            return self
        kept = np.zeros(len(scores), bool)
        kept[np.argsort(-scores, kind="stable")[:most]] = True
        by_phrase = np.split(kept, np.cumsum([len(p) for p in self.predictions])[:-1])
        chosen = [p[np.flatnonzero(k)] for p, k in zip(self.predictions, by_phrase, strict=True)]
        return self.with_predictions(chosen)

    @property
    def counts(self) -> dict[str, int]:
        """Number of instances per phrase (task `count`; apply a threshold to the predictions first)."""
        return {p.phrase: len(p) for p in self.predictions}

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types: boxes xyxy in pixels, masks as RLE, keypoints as {name: [x, y, score]}, images as PNG in
        base64."""
        instances = [instance for p in self.predictions for instance in _instances(p)]
        out: dict[str, Any] = {"task": self.task, "height": self.size[0], "width": self.size[1]}
        if self.route is not None:
            out["route"] = self.route
        if self.text is not None:
            out["text"] = self.text
        if self.task == "count":
            out["counts"] = self.counts
        if self.images is not None:
            out["images"] = [base64.b64encode(encode_png(image)).decode() for image in self.images]
        elif self.text is None or self.predictions:
            out["phrases"] = [p.phrase for p in self.predictions]
            out["instances"] = instances
        if self.parts is not None:
            out["parts"] = [part.to_dict() for part in self.parts]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answer:
        """The inverse of `to_dict`, for clients that draw or score a server's response."""
        size = (int(data["height"]), int(data["width"]))
        instances = data.get("instances") or []
        phrases = list(dict.fromkeys([*(data.get("phrases") or []), *(i["phrase"] for i in instances)]))
        predictions = [_prediction(phrase, [i for i in instances if i["phrase"] == phrase], size) for phrase in phrases]
        parts = None
        if data.get("parts") is not None:  # which may have a phrase twice
            parts = [AnswerPart.from_dict(part, size) for part in data["parts"]]
            predictions = [part.prediction for part in parts if part.prediction is not None]
        encoded = data.get("images")
        images = None if encoded is None else [decode_png(base64.b64decode(text)) for text in encoded]
        return cls(data["task"], size, predictions, data.get("text"), data.get("route"), images, parts=parts)


def _instances(p: Prediction) -> list[dict[str, Any]]:
    """The instances of a prediction in the form of `Answer.to_dict`."""
    instances = []
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
                name: [round(float(c), 3) for c in p.keypoints.xyv[i, k]] for k, name in enumerate(p.keypoints.names)
            }
        instances.append(item)
    return instances


def _prediction(phrase: str, instances: list[dict[str, Any]], size: Size) -> Prediction:
    """A `Prediction` of instances in the form of `Answer.to_dict`."""
    masks = keypoints = None
    if instances and instances[0].get("mask"):
        masks = Masks([i["mask"] for i in instances], size)
    if instances and instances[0].get("keypoints"):
        names = tuple(instances[0]["keypoints"])
        keypoints = Keypoints([[i["keypoints"][n] for n in names] for i in instances], names, size)
    boxes = Boxes([i["box"] for i in instances], size)
    return Prediction(phrase, boxes, [i["score"] for i in instances], masks, keypoints)
