"""The answer to a request, and its JSON."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction, Size
from lumen_ray.tasks import TASKS, task_of_route


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of an image, uint8 [h, w, 3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The image, uint8 [h, w, 3] RGB, of bytes from `encode_png`."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()


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


@dataclass(frozen=True)
class TokenUsage:
    """Tokens of an answer in text: those that the LLM has read for it, images included, and those that it has written,
    without the end token."""

    prompt: int
    completion: int


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
    #: the most probable tokens at the place of each, as (text, log probability), if `Sampling.top_log_probs` asks so
    top_tokens: list[list[tuple[str, float]]] | None = None
    #: whether the text is as long as it may be, though the LLM did not end it
    is_cut: bool = False
    #: of an answer that the LLM wrote, if only its routing token
    usage: TokenUsage | None = field(default=None, compare=False)
    #: of a text with instances in it, both in the order of writing: the texts joined are `text`, the predictions are
    #: `predictions`; None for other answers
    parts: list[AnswerPart] | None = None
    #: preset@version of the weights that gave it, on a server that may hold several; not in its JSON
    model: str | None = field(default=None, compare=False)

    def with_predictions(self, predictions: list[Prediction]) -> Answer:
        """The answer with these predictions, as many as it has or as its parts have routes, in its parts too."""
        if self.parts is None:
            return replace(self, predictions=predictions)
        following = iter(predictions)
        parts = [p if p.route is None else replace(p, prediction=next(following)) for p in self.parts]
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
