"""Counts what the model is asked and what it writes, for every API alike."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.image_cache import KeyedImage
from lumen_ray.serve.metrics import TASKS, TOKENS
from lumen_ray.structures import Size

if TYPE_CHECKING:
    from lumen_ray.serve.asking import Backend


class MeasuredBackend:
    """An `asking.Backend` around another one."""

    def __init__(self, backend: Backend):
        self._backend = backend

    async def infer(self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        answers = await self._backend.infer(image, requests, max_new_tokens)
        for answer in answers:
            _count(answer)
        return answers

    async def stream(
        self, image: Shown | KeyedImage, requests: Sequence[Request], max_new_tokens: int
    ) -> AsyncGenerator[str | Answer, None]:
        async with aclosing(self._backend.stream(image, requests, max_new_tokens)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    _count(piece)
                yield piece

    async def held_size(self, image_id: str, ask: bool) -> Size | None:
        return await self._backend.held_size(image_id, ask)

    async def info(self) -> dict[str, Any]:
        return await self._backend.info()

    async def ready(self) -> dict[str, bool]:
        return await self._backend.ready()


def _count(answer: Answer) -> None:
    TASKS.record(task=answer.task)
    if answer.usage is not None:
        TOKENS.record(answer.usage.prompt, direction="read")
        TOKENS.record(answer.usage.completion, direction="written")
