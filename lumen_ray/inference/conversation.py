"""A conversation: several questions in a row about an image, about several, or in text alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from lumen_ray.inference.request import Request, Shown, check_call, images_of, make_request
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.inference.trunk_stage import EncodedImages, OnText
from lumen_ray.structures import Answer


class ConversationEngine(Protocol):
    """What a conversation needs of an engine; see `engine.Engine`."""

    def encode(self, images: Sequence[Shown]) -> EncodedImages:
        """Encodes images for several calls of `run`."""

    def run(
        self,
        images: Sequence[Shown] | EncodedImages,
        requests: Sequence[Sequence[Request]],
        *,
        max_new_tokens: int = ...,
        on_text: OnText | None = ...,
    ) -> list[list[Answer]]:
        """The answers to requests about images or encoded images."""


class _Abandoned(Exception):
    """Nobody reads the answer any more."""


class Conversation:
    """Keeps the images encoded, and the questions and answers so far in `history`.

    Of an answer that a decoder has a part in (boxes, pictures), only the text enters `history`, if there is any.
    """

    def __init__(self, engine: ConversationEngine, images: Shown = None, system: str = "", sampling: Sampling = GREEDY):
        self.engine = engine
        self.system = system
        self.sampling = sampling
        self.history: list[tuple[str, str]] = []
        #: the images so far, and for each the number of the question that brought it
        self.images: list[np.ndarray] = []
        self.image_turns: list[int] = []
        self._encoded: EncodedImages | None = None
        self.show(images)

    def show(self, images: Shown) -> None:
        """Adds images, which the next question and those behind it see; the first one of a conversation stands before
        all questions. Raises `UserError` if they are none."""
        check_call([images], [[]], 0.0)
        if new := images_of(images):
            self._encoded = self.engine.encode([[*self.images, *new]])
            self.images += new
            self.image_turns += [len(self.history)] * len(new)

    def ask(self, text: str, images: Shown = None, *, max_new_tokens: int = 256) -> Answer:
        """The answer to the next question, which may bring images. Raises `UserError` for a text that `make_request`
        refuses, and for a conversation longer than the LLM's context (`context_too_long`)."""
        self.show(images)
        return self._run(text, max_new_tokens, lambda text: None)

    def stream(self, text: str, images: Shown = None, *, max_new_tokens: int = 256) -> Iterator[str | Answer]:
        """Yields the texts of the answer as they are written, then the `Answer`. Closing the iterator gives the answer
        up at its next token. Raises as `ask`."""
        self.show(images)
        pieces: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def on_text(new: str) -> None:
            if abandoned.is_set():
                raise _Abandoned
            if new:
                pieces.put(new)

        def run() -> None:
            try:
                pieces.put(self._run(text, max_new_tokens, on_text))
            except BaseException as error:  # raised in the thread that reads
                pieces.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if isinstance(piece, Answer):
                    return
        finally:
            abandoned.set()
            thread.join()

    def _run(self, text: str, max_new_tokens: int, on_text: Callable[[str], None]) -> Answer:
        request = make_request(
            "chat",
            text=text,
            history=self.history,
            system=self.system,
            sampling=self.sampling,
            image_turns=self.image_turns[1:],
        )
        ((answer,),) = self.engine.run(
            self._encoded or [None],
            [[request]],
            max_new_tokens=max_new_tokens,
            on_text=lambda _image, _request, new: on_text(new),
        )
        if answer.text:
            self.history.append((request.text, answer.text))
        return answer
