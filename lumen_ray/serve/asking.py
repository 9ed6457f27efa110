"""From the body of a request to the answers of the model: reading, decoding, the images that are held, streaming."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from lumen_ray.answer import Answer
from lumen_ray.data.images import Picture
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.http import Unavailable
from lumen_ray.serve.image_cache import ImageGone, KeyedImage, gone, image_id
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Size
from lumen_ray.wire import schemas
from lumen_ray.wire.images import GivenImage
from lumen_ray.wire.requests import Asked, Prepared, decode_examples, prepare
from lumen_ray.wire.settings import Limits


class Backend(Protocol):
    """The model behind the API. `ingress.ServeBackend` implements it over Serve; tests use a fake."""

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """Answers about an image, those of a conversation, or text alone, one per request, in order. Raises `ImageGone`
        for a `KeyedImage` without its picture that is not held."""

    def stream(
        self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int
    ) -> AsyncGenerator[str | Answer, None]:
        """The texts of the answer to a single request as they are written, then the answer. Raises as `infer`, also
        behind some text."""

    async def held_size(self, image_id: str, ask: bool) -> Size | None:
        """(height, width) of an image that a trunk holds, as far as this process remembers, or, with `ask`, as the
        trunk says; None if it holds none."""

    async def info(self) -> dict[str, Any]:
        """preset, version, image_size, classes, skeletons of the loaded model."""

    async def ready(self) -> dict[str, bool]:
        """Deployment name -> whether it answers now."""


async def answer(
    backend: Backend,
    settings: ServeSettings,
    images: Sequence[GivenImage],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    held_id: str | None = None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to `tasks` about an image or none, or about the image of id `held_id`, which the server was shown before;
    and the response's fields as of `ask`."""
    return await ask(backend, settings, lambda: Asked(images, tasks), held_id)


async def answer_each(
    backend: Backend,
    settings: ServeSettings,
    images: Sequence[GivenImage],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    places: Sequence[str] = (),
) -> tuple[list[list[Answer]], dict[str, Any]]:
    """`answer` about each of several images: a list for each, and the response's fields; the times are the longest.
    `places`: as of `decode_images`. The limits of a request hold for all images together, with those of examples."""
    if len(images) > settings.limits.max_images:
        raise UserError(
            f"{len(images)} images in one request; give at most {settings.limits.max_images}", "too_many_images"
        )
    whole = await _fetched(Asked(images, tasks, places=places), settings)
    encoded = whole.encoded
    examples = await asyncio.to_thread(decode_examples, whole, settings.limits)

    def asked(number: int) -> Asked:
        return Asked([encoded[number]], tasks, (), places[number : number + 1], len(encoded), examples)

    try:
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(ask(backend, settings, partial(asked, number))) for number in range(len(encoded))
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    answers, extras = zip(*(task.result() for task in running), strict=True)
    timing = {name: max(extra["timing_ms"][name] for extra in extras) for name in extras[0]["timing_ms"]}
    return list(answers), {"model": extras[0]["model"], "timing_ms": timing}


async def _fetched(asked: Asked, settings: ServeSettings) -> Asked:
    """The request with the images that it names by web addresses."""
    addresses = asked.addresses(settings.limits)
    if not addresses:
        return asked
    from lumen_ray.serve.remote_images import fetch_images

    return replace(asked, fetched=await fetch_images(addresses, settings.remote_images))


async def ask(
    backend: Backend, settings: ServeSettings, read: Callable[[], Asked], held_id: str | None = None
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to what `read` finds in a body, in a thread, and the response's fields `model`, `timing_ms` and, for a
    single image, `image_id`. An image that a trunk holds is neither decoded nor encoded again."""
    call = await _Call.begin(backend, settings, read, held_id)
    if known := await call.known():
        return list(known), await call.extra(known[0])
    try:
        answers = await backend.infer(*await call.prepare(call.held))
    except ImageGone:
        if not call.asked.images:
            raise
        answers = await backend.infer(*await call.prepare(None))
    return answers, await call.extra(answers[0])


async def ask_streaming(
    backend: Backend, settings: ServeSettings, read: Callable[[], Asked]
) -> AsyncGenerator[str | tuple[Answer, dict[str, Any]], None]:
    """The texts of the answer to the single task that `read` finds, as they are written, then the answer with the
    response's fields as of `ask`. What is wrong with the request is raised before the first text."""
    call = await _Call.begin(backend, settings, read, None)
    for answer in await call.known():
        yield answer, await call.extra(answer)
        return
    held, text = call.held, SentText()
    while True:
        text.begin()
        try:
            async with aclosing(backend.stream(*await call.prepare(held))) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Answer):
                        yield piece, await call.extra(piece)
                    elif new := text.unsent(piece):
                        yield new
            return
        except ImageGone:  # also behind some text, where a replica died and the next one does not hold the image
            if held is None:
                raise
            held = None


class SentText:
    """The text of an answer that a client has. An answer that is written again, after a replica died, goes on there."""

    def __init__(self) -> None:
        self._sent = self._written = ""

    def begin(self) -> None:
        """The answer is written from its beginning."""
        self._written = ""

    def unsent(self, piece: str) -> str:
        """What is new in the next piece; empty while the answer is not as far as before. Raises `Unavailable` if it is
        another one."""
        self._written += piece
        if not (self._written.startswith(self._sent) or self._sent.startswith(self._written)):
            raise Unavailable("a replica died during this answer; ask again")
        new = self._written[len(self._sent) :]
        self._sent += new
        return new


class _Call:
    """A request on its way. `held`: (height, width) of its image, if a trunk is said to hold it."""

    def __init__(
        self,
        asked: Asked,
        backend: Backend,
        settings: ServeSettings,
        info: dict[str, Any],
        key: str | None,
        held: Size | None,
    ):
        self.asked, self.held = asked, held
        self._backend, self._settings, self._info, self._key = backend, settings, info, key
        self._requests: tuple[Request, ...] | None = None
        self._start, self._fetching, self._decoding = time.perf_counter(), 0.0, 0.0

    @classmethod
    async def begin(
        cls, backend: Backend, settings: ServeSettings, read: Callable[[], Asked], held_id: str | None
    ) -> _Call:
        start = time.perf_counter()
        info = await backend.info()

        def key_of(asked: Asked) -> str | None:
            is_kept = held_id is None and len(asked.images) == 1 and settings.trunk.image_cache_mb
            return image_id(asked.encoded[0]) if is_kept else held_id

        def read_and_hash() -> tuple[Asked, str | None]:
            asked = read()
            return asked, None if asked.addresses(settings.limits) else key_of(asked)

        asked, key = await asyncio.to_thread(read_and_hash)
        fetching = 0.0
        if asked.addresses(settings.limits):
            began = time.perf_counter()
            asked = await _fetched(asked, settings)
            fetching = time.perf_counter() - began
            key = await asyncio.to_thread(key_of, asked)
        held = None if key is None else await backend.held_size(key, ask=held_id is not None)
        if held_id is not None and held is None:
            raise gone(held_id)
        call = cls(asked, backend, settings, info, key, held)
        call._start, call._fetching = start, fetching
        return call

    async def known(self) -> tuple[Answer, ...]:
        """The answer that the request has already; else none."""
        return () if self.asked.text is None else (await self._prepared(self.held)).known

    async def prepare(self, held: Size | None) -> tuple[Shown | KeyedImage, tuple[Request, ...], int]:
        """The arguments of the backend, with the image decoded unless it is `held`; the requests are the same each
        time, with the seed that was drawn."""
        prepared = await self._prepared(held)
        shown: Shown | KeyedImage = prepared.shown
        if self._key is not None:
            assert shown is None or isinstance(shown, Picture)
            shown = KeyedImage(self._key, prepared.size, shown)
        self._requests = self._requests or prepared.requests
        return shown, self._requests, prepared.max_new_tokens

    async def _prepared(self, held: Size | None) -> Prepared:
        began = time.perf_counter()
        defaults, side = self._settings.defaults, self._info.get("largest_side")
        prepared = await asyncio.to_thread(prepare, self.asked, self._limits(), defaults, side, held)
        self._decoding += time.perf_counter() - began
        return prepared

    def _limits(self) -> Limits:
        """Of the settings; the model's own classes are never too many."""
        limits, own = self._settings.limits, len(self._info.get("classes", ()))
        return limits if own <= limits.max_classes else limits.model_copy(update={"max_classes": own})

    async def extra(self, answer: Answer) -> dict[str, Any]:
        """Fields of the response, now that it is complete; `answer`: its first."""
        total = time.perf_counter() - self._start
        before = {"fetch": self._fetching} if self._fetching else {}
        timing = {**before, "decode": self._decoding, "model": total - self._fetching - self._decoding, "total": total}
        extra: dict[str, Any] = {
            "model": answer.model or f"{self._info['preset']}@{self._info['version']}",
            "timing_ms": {name: round(1000 * seconds, 1) for name, seconds in timing.items()},
        }
        if self._key is not None and await self._backend.held_size(self._key, ask=False):
            extra["image_id"] = self._key
        return extra
