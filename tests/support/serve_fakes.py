"""A backend without Ray or a model, a model that is not trained, and small images."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.answer import Answer
from lumen_ray.data.images import Picture
from lumen_ray.decoders.base import PredictSettings
from lumen_ray.inference.outputs import finish, request_limits
from lumen_ray.inference.request import Request, Shown, images_of
from lumen_ray.serve.image_cache import KeyedImage
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction, SampleSettings
from lumen_ray.tasks import TASKS, get_task, task_of_prompt, task_of_route

INFO = {
    "preset": "nano",
    "version": "abc123",
    "image_size": 128,
    "tasks": list(TASKS),
    "decoders": {},
    "classes": ["red circle", "blue square"],
    "skeletons": {"red circle": ["top", "left"]},
}


def fake_answer(request: Request, size: tuple[int, int]) -> Answer:
    """Two instances per phrase, with scores 0.9 and 0.2, of the task's result type. A chat that has to be routed goes
    to the first decoder that it may go to."""
    task = get_task(request.task)
    if request.routing.is_required:
        routed = task_of_route(request.routing.tokens[0])
        phrase = (task_of_prompt(request.text) or ("", request.text))[1]
        asked = Request(routed.name, (phrase,), sample=SampleSettings())
        return replace(fake_answer(asked, size), task=task.name)
    if task.is_text:
        return Answer(task.name, size, text=f"{task.name} says {request.text}".strip())
    if task.result == "image":
        pictures = [np.full((*(request.sample.size or (8, 8)), 3), 7, np.uint8)] * request.sample.num_images
        return Answer(task.name, size, route=task.routing_token, images=pictures)
    predictions = []
    for phrase in request.phrases or ("region",):
        boxes = Boxes([[2, 3, 12, 13], [5, 5, 9, 9]], size)
        masks = keypoints = None
        if task.result == "masks":
            pixels = np.zeros((2, *size), bool)
            pixels[:, 3:13, 2:12] = True
            masks = Masks.from_arrays(pixels)
        if task.result == "keypoints":
            names = request.keypoints or ("top", "left")
            keypoints = Keypoints(np.full((2, len(names), 3), 0.5), names, size)
        predictions.append(Prediction(phrase, boxes, [0.9, 0.2], masks, keypoints))
    return Answer(task.name, size, predictions, route=task.routing_token)


def pixels_of(image: Shown | KeyedImage) -> Shown:
    """The same with arrays in place of pictures, which the backend gets at full scale."""
    if isinstance(image, KeyedImage):
        image = image.picture
    return image.pixels if isinstance(image, Picture) else [pixels_of(i) for i in image] if image else None


class FakeBackend:
    """Records its calls; `error` is raised instead of an answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[Request], int]] = []
        self.error: Exception | None = None
        self.deployments = {"trunk": True, "lumen": True}

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        image = pixels_of(image)
        self.calls.append((image, list(requests), max_new_tokens))
        if self.error is not None:
            raise self.error
        shown = images_of(image)
        size = (shown[-1].shape[0], shown[-1].shape[1]) if shown else (8, 8)
        limits = [request_limits(request, PredictSettings()) for request in requests]
        return [
            finish(fake_answer(request, size), limit, PredictSettings(-1.0))
            for request, limit in zip(requests, limits, strict=True)
        ]

    async def stream(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> Any:
        """The text word by word, then the answer."""
        (answer,) = await self.infer(image, requests, max_new_tokens)
        for n, word in enumerate((answer.text or "").split()):
            yield word if n == 0 else f" {word}"
        yield answer

    async def held_size(self, image_id: str, ask: bool) -> None:
        return None

    async def info(self) -> dict[str, Any]:
        return INFO

    async def ready(self) -> dict[str, bool]:
        return self.deployments


def png(width: int = 20, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(width: int = 20, height: int = 16) -> str:
    return base64.b64encode(png(width, height)).decode()


def save_random_model(folder: Path) -> Path:
    """The nano preset with fresh weights, knowing one skeleton."""
    from lumen_ray import config
    from lumen_ray.model.build import ModelMeta, build_model, save_model
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.trunk.tokenizer import LumenTokenizer

    settings = config.load(ModelSettings, Path(__file__).parents[2] / "configs" / "models" / "nano.yaml")
    tokenizer = LumenTokenizer.train(["detect red circle and blue square", "pose of figure"], settings.vocab_size)
    meta = ModelMeta("nano", ["red circle", "figure"], {"figure": ["head", "left hand"]}, {"figure": [[0, 1]]})
    state = build_model(settings, len(tokenizer)).state_dict()
    return save_model(folder, state, settings, tokenizer, meta)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
