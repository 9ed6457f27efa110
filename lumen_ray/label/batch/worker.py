"""Answers the lines of a batch file: parsed, checked and answered by the same code as a server's requests."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.inference.request import Shown
from lumen_ray.label.batch.images import image_reader
from lumen_ray.label.batch.lines import read_lines
from lumen_ray.label.batch.requests import ANSWER_SCHEMA, Line, LineReader
from lumen_ray.label.inputs import RETRY_S, Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.plan import Fragment
from lumen_ray.label.reading import ImageInHand
from lumen_ray.label.workers import LabelActor, Labeller, WorkerSettings
from lumen_ray.wire.settings import Defaults, Limits


class BatchLabeller(Labeller):
    """A model that answers the lines of a batch file.

    Limits are those of a server with default settings; the settings' threshold and lengths are the defaults of
    requests. Sampling is honoured.
    """

    def __init__(self, settings: WorkerSettings):
        super().__init__(settings)
        self.ledger = Ledger(settings.output, ANSWER_SCHEMA)
        if self.fault:
            return
        engine, defaults = self.engine, Defaults(**self._run_settings())
        self._lines = LineReader(
            *(engine.preset, engine.version, engine.tasks, engine.largest_side, Limits(), defaults),
            takes_sampling=True,
            read_image=image_reader,
        )

    def _answered(self, fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, list[ImageInHand]]]:
        """The fragments with all their lines answered. The next lines are read while the model has these."""
        size = self.settings.batch_size
        batches = [
            (fragment, fragment.items[start : start + size], start + size >= len(fragment.items))
            for fragment in fragments
            for start in range(0, len(fragment.items), size)
        ]
        coming: Future[list[Line]] | None = None
        answered: list[ImageInHand] = []
        for number, (fragment, items, is_last) in enumerate(batches):
            lines = self._read_lines(items) if coming is None else coming.result()
            if number + 1 < len(batches):
                coming = self._reader.submit(self._read_lines, batches[number + 1][1])
            began = time.monotonic()
            self._answer_lines([line for line in lines if not line.reason])
            self._busy_seconds += time.monotonic() - began
            for line in lines:
                line.forget()
            answered += lines
            if is_last:
                yield fragment, answered
                answered = []

    def _read_lines(self, items: Sequence[Item]) -> list[Line]:
        try:
            found = list(read_lines(items))
        except files.StoreError:
            time.sleep(RETRY_S)
            found = list(read_lines(items))
        if self._decoders is None:
            return [self._lines.read(item, data) for item, data in found]
        return list(self._decoders.map(lambda pair: self._lines.read(*pair), found))

    def _answer_lines(self, lines: Sequence[Line]) -> None:
        """Fills in the records of lines. Those with equally long answers share a call of the engine."""
        groups: dict[int, list[Line]] = {}
        for line in lines:
            assert line.prepared is not None, "lines that failed are not answered"
            groups.setdefault(line.prepared.max_new_tokens, []).append(line)
        for max_new_tokens, group in groups.items():
            self._answer_group(group, max_new_tokens)

    def _answer_group(self, lines: Sequence[Line], max_new_tokens: int) -> None:
        """A group that fails is retried line by line."""
        prepared = [line.prepared for line in lines if line.prepared is not None]
        shown: list[Shown] = [one.shown for one in prepared]
        try:
            options = {**self._run_settings(), "max_new_tokens": max_new_tokens}
            answers = self.engine.run(shown, [list(one.requests) for one in prepared], **options)
        except Exception as error:  # one line must not stop the others
            if len(lines) > 1:
                for line in lines:
                    self._answer_group([line], max_new_tokens)
            elif isinstance(error, UserError):
                lines[0].fail(error)
            else:
                where = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                lines[0].fail(UserError(what, "internal_error"))
                lines[0].reason = "model_error"
            return
        for line, choices in zip(lines, answers, strict=True):
            assert line.prepared is not None, "lines that failed are not answered"
            line.answer(choices or line.prepared.known, self._lines.model)


class BatchActor(LabelActor, BatchLabeller):
    """A `BatchLabeller` of Ray Data's actor pool."""
