"""Counts what the model is asked and what it writes, for every API alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lumen_ray.answer import Answer
from lumen_ray.inference.request import Request, Shown
from lumen_ray.serve.metrics import TASKS, TOKENS

if TYPE_CHECKING:
    from lumen_ray.serve.task_api import Backend


class MeasuredBackend:
    """A `task_api.Backend` around another one."""

    def __init__(self, backend: Backend):
        self._backend = backend

    async def infer(self, image: Shown, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        answers = await self._backend.infer(image, requests, max_new_tokens)
        for answer in answers:
            TASKS.record(task=answer.task)
            if answer.usage is not None:
                TOKENS.record(answer.usage.prompt, direction="read")
                TOKENS.record(answer.usage.completion, direction="written")
        return answers

    async def info(self) -> dict[str, Any]:
        return await self._backend.info()

    async def ready(self) -> dict[str, bool]:
        return await self._backend.ready()
