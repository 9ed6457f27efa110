"""From the body of a request to the answers of the model: reading, decoding, the images that are held, streaming."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from lumen_ray.answer import Answer
from lumen_ray.data.images import Picture
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.image_cache import ImageGone, KeyedImage, gone, image_id
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.structures import Size
from lumen_ray.wire import schemas
from lumen_ray.wire.images import check_sizes
from lumen_ray.wire.requests import Asked, prepare


class Backend(Protocol):
    """The model behind the API. `ingress.ServeBackend` implements it over Serve; tests use a fake."""

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        """Answers about an image, those of a conversation, or text alone, one per request, in order. Raises `ImageGone`
        for a `KeyedImage` without its picture that is not held."""

    def stream(
        self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int
    ) -> AsyncIterator[str | Answer]:
        """The texts of the answer to a single request as they are written, then the answer. Raises as `infer`,
        `ImageGone` before the first text."""

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
    encoded: Sequence[bytes],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    held_id: str | None = None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to `tasks` about an encoded image or none, or about the image of id `held_id`, which the server was shown
    before; and the response's fields as of `ask`."""
    return await ask(backend, settings, lambda: Asked(encoded, tasks), held_id)


async def answer_each(
    backend: Backend,
    settings: ServeSettings,
    encoded: Sequence[bytes],
    tasks: Sequence[tuple[str, schemas.TaskFields]],
    places: Sequence[str] = (),
) -> tuple[list[list[Answer]], dict[str, Any]]:
    """`answer` about each of several images: a list for each, and the response's fields; the times are the longest.
    `places`: as of `decode_images`."""
    if len(encoded) > settings.limits.max_images:
        raise UserError(
            f"{len(encoded)} images in one request; give at most {settings.limits.max_images}", "too_many_images"
        )
    await asyncio.to_thread(check_sizes, encoded, settings.limits.max_pixels, places)

    def asked(number: int) -> Asked:
        return Asked([encoded[number]], tasks, places=places[number : number + 1], copies=len(encoded))

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


async def ask(
    backend: Backend, settings: ServeSettings, read: Callable[[], Asked], held_id: str | None = None
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to what `read` finds in a body, in a thread, and the response's fields `model`, `timing_ms` and, for a
    single image, `image_id`. An image that a trunk holds is neither decoded nor encoded again."""
    call = await _Call.begin(backend, settings, read, held_id)
    try:
        answers = await backend.infer(*await call.prepare(call.held))
    except ImageGone:
        if not call.asked.encoded:
            raise
        answers = await backend.infer(*await call.prepare(None))
    return answers, call.extra()


async def ask_streaming(
    backend: Backend, settings: ServeSettings, read: Callable[[], Asked]
) -> AsyncGenerator[str | tuple[Answer, dict[str, Any]], None]:
    """The texts of the answer to the single task that `read` finds, as they are written, then the answer with the
    response's fields as of `ask`. What is wrong with the request is raised before the first text."""
    call = await _Call.begin(backend, settings, read, None)
    held = call.held
    while True:
        try:
            async for piece in backend.stream(*await call.prepare(held)):
                yield (piece, call.extra()) if isinstance(piece, Answer) else piece
            return
        except ImageGone:  # nothing was written yet
            if held is None:
                raise
            held = None


class _Call:
    """A request on its way. `held`: (height, width) of its image, if a trunk is said to hold it."""

    def __init__(self, asked: Asked, settings: ServeSettings, info: dict[str, Any], key: str | None, held: Size | None):
        self.asked, self.held = asked, held
        self._settings, self._info, self._key = settings, info, key
        self._start, self._decoding = time.perf_counter(), 0.0

    @classmethod
    async def begin(
        cls, backend: Backend, settings: ServeSettings, read: Callable[[], Asked], held_id: str | None
    ) -> _Call:
        start = time.perf_counter()
        info, asked = await backend.info(), await asyncio.to_thread(read)
        key = held_id
        if key is None and len(asked.encoded) == 1 and settings.trunk.image_cache_mb:
            key = image_id(asked.encoded[0])
        held = None if key is None else await backend.held_size(key, ask=held_id is not None)
        if held_id is not None and held is None:
            raise gone(held_id)
        call = cls(asked, settings, info, key, held)
        call._start = start
        return call

    async def prepare(self, held: Size | None) -> tuple[Shown | KeyedImage, tuple[Request, ...], int]:
        """The arguments of the backend, with the image decoded unless it is `held`."""
        began = time.perf_counter()
        limits, defaults, side = self._settings.limits, self._settings.defaults, self._info.get("largest_side")
        prepared = await asyncio.to_thread(prepare, self.asked, limits, defaults, side, held)
        self._decoding += time.perf_counter() - began
        shown: Shown | KeyedImage = prepared.shown
        if self._key is not None:
            assert shown is None or isinstance(shown, Picture)
            shown = KeyedImage(self._key, prepared.size, shown)
        return shown, prepared.requests, prepared.max_new_tokens

    def extra(self) -> dict[str, Any]:
        """Fields of the response, now that it is complete."""
        total = time.perf_counter() - self._start
        timing = {"decode": self._decoding, "model": total - self._decoding, "total": total}
        extra: dict[str, Any] = {
            "model": f"{self._info['preset']}@{self._info['version']}",
            "timing_ms": {name: round(1000 * seconds, 1) for name, seconds in timing.items()},
        }
        if self._key is not None:
            extra["image_id"] = self._key
        return extra
