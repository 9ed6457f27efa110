"""A backend whose requests go wrong by their texts, and batches that are answered in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumen_ray.errors import UserError
from lumen_ray.serve.batches.batch_store import BatchStore
from lumen_ray.serve.batches.file_store import FileStore
from lumen_ray.serve.batches.runner import BatchRunner
from lumen_ray.serve.http import Overloaded, Unavailable
from lumen_ray.serve.job import sender
from lumen_ray.serve.settings import Batches, ServeSettings
from support.chat_fakes import line
from support.serve_fakes import FakeBackend

__all__ = ["BatchServer", "ScriptedBackend", "line"]


class ScriptedBackend(FakeBackend):
    """Fails by the first word of a question: "busy" and "lost" the first time, "dies", "late", "refuse" and "crash"
    each time. `asked`: how often each question was; `senders`: on whose behalf; `most`: questions at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.inside = self.most = 0
        self.senders: set[str] = set()

    async def infer(self, image: Any, requests: Any, max_new_tokens: int) -> Any:
        text = requests[0].text
        self.asked[text] += 1
        self.senders.add(sender.get())
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0)
            kind, is_first = text.split()[0], self.asked[text] == 1
            if kind == "busy" and is_first:
                raise Overloaded("full", 0)
            if kind == "dies" or (kind == "lost" and is_first):
                raise Unavailable("a replica died during this request; try again")
            if kind == "late":
                raise TimeoutError
            if kind == "refuse":
                raise UserError("the conversation is too long", "context_too_long")
            if kind == "crash":
                raise RuntimeError("a bug")
            return await super().infer(image, requests, max_new_tokens)
        finally:
            self.inside -= 1


class BatchServer:
    """Files and batches in a folder, and whoever answers them."""

    def __init__(self, folder: Path, backend: FakeBackend | None = None, **limits: Any):
        self.settings = ServeSettings(model="m", batches=Batches(folder=str(folder), **limits))
        assert self.settings.batches is not None
        self.now = float(int(time.time()))
        self.backend = backend or ScriptedBackend()
        self.files = FileStore(self.settings.batches, lambda: self.now)
        self.batches = BatchStore(self.settings.batches, lambda: self.now)

    def upload(self, *lines: str, owner: str | None = None) -> str:
        """The id of a file of these lines."""
        path = Path(self.settings.batches.folder) / "upload"
        path.write_text("\n".join(lines))
        with path.open("rb") as file:
            return self.files.add(file, owner, "requests.jsonl").id

    def create(self, *lines: str, window_s: int = 86_400) -> str:
        """The id of a new batch of these lines."""
        asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return self.batches.add(None, window_s, input_file_id=self.upload(*lines), **asked).id

    def shown(self, batch_id: str, owner: str | None = None) -> dict[str, Any]:
        return self.batches.shown(self.batches.get(batch_id, owner))

    async def run(self, done: Callable[[BatchRunner], bool]) -> None:
        """Answers batches until `done`, and stops then and there."""
        runner = BatchRunner(self.files, self.batches, self.backend, self.settings, lambda: self.now)
        task = asyncio.create_task(runner.run())
        try:
            while not done(runner):
                assert not task.done(), task.result()
                await asyncio.sleep(0.002)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def finish(self, *batch_ids: str, owner: str | None = None) -> list[dict[str, Any]]:
        """The batches, once they have ended."""

        def is_over(batch_id: str) -> bool:
            return self.batches.state(batch_id).has_ended and not self.batches.work(batch_id).exists()

        asyncio.run(self.run(lambda _: all(map(is_over, batch_ids))))
        return [self.shown(batch_id, owner) for batch_id in batch_ids]

    def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of an output file; none without one."""
        if file_id is None:
            return []
        text = self.files.content(self.files.get(file_id, None).id).read_text()
        return [json.loads(row) for row in text.splitlines()]
