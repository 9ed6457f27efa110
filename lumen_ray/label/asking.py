"""How a label job asks about a batch of images: as a whole or tile by tile, with the classes of the job or those that
the model's captions name, and with a second look. However often an image is asked about, it is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.data.windows import Windows
from lumen_ray.errors import UserError
from lumen_ray.inference.protocol import EncodingEngine, EngineProtocol
from lumen_ray.inference.request import Image, Request, make_request
from lumen_ray.inference.second_look import SecondLook
from lumen_ray.inference.tiles import Tiles, run_tiled
from lumen_ray.label.vocabulary import caption_classes, check_auto, classes_for, is_named_by_caption


@dataclass(frozen=True)
class SecondLookSettings:
    """`agree_with`: the decoder whose instances are compared, None for none; `verify`: each instance is asked about."""

    agree_with: str | None = None
    verify: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What is asked for, as JSON types; empty for none."""
        asked: dict[str, Any] = {} if self.agree_with is None else {"agree_with": self.agree_with}
        return asked | ({"verify": True} if self.verify else {})


class Asker:
    """Asks an engine `requests` about images; those of class tasks without phrases get the classes of the image's
    caption. `options`: of `Engine.run`.

    Raises `UserError` if the engine cannot answer the requests, look a second time, or name classes.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        requests: Iterable[Request],
        second: SecondLookSettings,
        tiles: Tiles | None,
        batch_size: int,
        options: dict[str, Any],
    ):
        self.requests = _fit_requests(requests, engine)
        self._skeletons = engine.skeletons
        self._tiles, self._batch_size, self._options = tiles, batch_size, options
        self._engine: EngineProtocol | SecondLook = engine
        #: the same engine where images are asked about several times
        self._encoder: EncodingEngine | SecondLook | None = None
        self._by_caption = any(map(is_named_by_caption, self.requests))
        tasks = list(dict.fromkeys(request.task for request in self.requests))
        if not (self._by_caption or second.as_dict()):
            return
        if not isinstance(engine, EncodingEngine):
            raise UserError(
                "the model's engine encodes no images for several questions, so classes 'auto', agree_with and verify "
                "are not to be had; leave them out",
                "cannot_encode",
            )
        self._encoder = engine
        if self._by_caption:
            named = [request.keypoints or () for request in self.requests]
            check_auto(tasks, engine.tasks, engine.skeletons, [name for names in named for name in names])
        if second.as_dict():
            self._engine = self._encoder = SecondLook(engine, tasks, second.agree_with, second.verify)

    def about(self, images: list[Image]) -> list[list[Answer]]:
        """The answers about each of some images of one input size, in the order of `requests`."""
        if self._encoder is None:
            return self._engine.run(images, [self.requests] * len(images), **self._options)
        encoded = self._encoder.encode(images)
        asked = self._named(encoded, len(images))
        found = self._engine.run(encoded, [row.left for row in asked], **self._options)
        return [row.with_answers(answers) for row, answers in zip(asked, found, strict=True)]

    def in_tiles(self, image: np.ndarray | Windows) -> list[Answer]:
        """The answers about an image that is looked at as a whole and in tiles."""
        assert self._tiles is not None, "others are looked at as a whole"
        encoded = None
        if self._encoder is not None:
            whole = image if isinstance(image, np.ndarray) else image.overview(self._encoder.largest_side)
            encoded = self._encoder.encode([whole])
        (asked,) = self._named(encoded, 1)
        answers = run_tiled(
            self._engine, image, asked.left, self._tiles, batch_size=self._batch_size, encoded=encoded, **self._options
        )
        return asked.with_answers(answers)

    def _named(self, encoded: Any, number: int) -> list[_Asked]:
        """What is left to ask about each of `number` encoded images, once their captions have named classes."""
        if not self._by_caption:
            return [_Asked(self.requests, [None] * len(self.requests)) for _ in range(number)]
        captions = self._engine.run(encoded, [[make_request("caption")]] * number, **self._options)
        return [self._asked(caption) for (caption,) in captions]

    def _asked(self, caption: Answer) -> _Asked:
        classes = caption_classes(caption.text or "")
        requests, known = [], list[Answer | None]()
        for request in self.requests:
            answer = caption if request.task == "caption" else None
            if is_named_by_caption(request):
                request = replace(
                    request, phrases=classes_for(request.task, request.keypoints, classes, self._skeletons)
                )
                answer = None if request.phrases else Answer(request.task, caption.size)
            requests.append(request)
            known.append(answer)
        return _Asked(requests, known)


@dataclass
class _Asked:
    """The requests about an image, and the answers that are known before they are asked."""

    requests: list[Request]
    known: list[Answer | None]

    @property
    def left(self) -> list[Request]:
        """The requests without a known answer."""
        return [request for request, answer in zip(self.requests, self.known, strict=True) if answer is None]

    def with_answers(self, answers: Sequence[Answer]) -> list[Answer]:
        """The answers to all requests; `answers`: to those that were left."""
        following = iter(answers)
        return [next(following) if answer is None else answer for answer in self.known]


def _fit_requests(requests: Iterable[Request], engine: EngineProtocol) -> list[Request]:
    """Narrows pose requests without keypoints to the classes that the model has a skeleton for.

    One list of classes then serves all tasks. Raises `UserError` if no class is left.
    """
    fitted = []
    for request in requests:
        if request.task == "pose" and request.phrases and not request.keypoints and engine.skeletons:
            posed = tuple(name for name in request.phrases if name in engine.skeletons)
            if not posed:
                raise UserError(
                    f"task 'pose' has no class with keypoints; classes with keypoints in this model: "
                    f"{', '.join(sorted(engine.skeletons))} (or name the keypoints)",
                    "no_skeleton",
                )
            request = replace(request, phrases=posed)
        fitted.append(request)
    return fitted
