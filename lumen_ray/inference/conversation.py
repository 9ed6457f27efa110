"""A conversation: several questions in a row about an image, about several, or in text alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lumen_ray.answer import Answer
from lumen_ray.inference.encoded_images import EncodedImages
from lumen_ray.inference.request import Image, Request, Shown, check_call, images_of, make_request
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.inference.trunk_stage import OnText


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


@dataclass(frozen=True)
class _Images:
    """The images of a conversation, the question that brought each, and what the engine made of them."""

    images: tuple[Image, ...] = ()
    turns: tuple[int, ...] = ()
    encoded: EncodedImages | None = None


class Conversation:
    """Keeps the images encoded, and the questions and answers so far in `history`. A question that brings images
    encodes all of them once more.

    Of an answer that a decoder has a part in (boxes, pictures), only the text enters `history`; a question that has an
    answer without a text is left out too. A question that fails or whose stream is closed leaves no trace.
    """

    def __init__(self, engine: ConversationEngine, images: Shown = None, system: str = "", sampling: Sampling = GREEDY):
        self.engine = engine
        self.system = system
        self.sampling = sampling
        self.history: list[tuple[str, str]] = []
        self._shown = self._with(images, _Images())

    @property
    def images(self) -> tuple[Image, ...]:
        """The images so far."""
        return self._shown.images

    @property
    def image_turns(self) -> tuple[int, ...]:
        """For each image the number of the question that brought it, from 0."""
        return self._shown.turns

    def _with(self, images: Shown, before: _Images) -> _Images:
        """The images so far and those of the next question. Raises `UserError` if they are none."""
        check_call([images], [[]], 0.0)
        if not (new := images_of(images)):
            return before
        everything = (*before.images, *new)
        turns = (*before.turns, *(len(self.history) for _ in new))
        return _Images(everything, turns, self.engine.encode([everything]))

    def ask(self, text: str, images: Shown = None, *, max_new_tokens: int = 256) -> Answer:
        """The answer to the next question. It may bring images, which it and those behind it see; the first image of a
        conversation stands before all questions.

        Raises `UserError` for a text that `make_request` refuses, for images that are none, and for a conversation
        longer than the LLM's context (`context_too_long`).
        """
        return self._run(text, images, max_new_tokens, lambda text: None)

    def stream(self, text: str, images: Shown = None, *, max_new_tokens: int = 256) -> Iterator[str | Answer]:
        """Yields the texts of the answer as they are written, then the `Answer`. Closing the iterator gives the answer
        up at its next token. Raises as `ask`, when the first text is taken."""
        pieces: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def on_text(new: str) -> None:
            if abandoned.is_set():
                raise _Abandoned
            if new:
                pieces.put(new)

        def run() -> None:
            try:
                pieces.put(self._run(text, images, max_new_tokens, on_text))
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

    def _run(self, text: str, images: Shown, max_new_tokens: int, on_text: Callable[[str], None]) -> Answer:
        shown = self._with(images, self._shown)
        request = make_request(
            "chat",
            text=text,
            history=self.history,
            system=self.system,
            sampling=self.sampling,
            image_turns=shown.turns[1:],
        )
        ((answer,),) = self.engine.run(
            shown.encoded or [None],
            [[request]],
            max_new_tokens=max_new_tokens,
            on_text=lambda _image, _request, new: on_text(new),
        )
        self._shown = shown
        if answer.text:
            self.history.append((request.text, answer.text))
        return answer
