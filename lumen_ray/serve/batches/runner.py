"""Answers batches with the served model, a bounded number of requests at a time, so that online users are not starved.

One process does so for a folder, the one that holds its claim; when it dies, the next one goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lumen_ray.data.claim import Claim
from lumen_ray.errors import UserError
from lumen_ray.label.batch.requests import Line, LineReader
from lumen_ray.label.inputs import Item
from lumen_ray.label.plan import Fragment
from lumen_ray.serve.asking import Backend
from lumen_ray.serve.batches.batch_store import BatchStore
from lumen_ray.serve.batches.file_store import Clock, FileStore
from lumen_ray.serve.batches.records import Batch, BatchState, Problem, Status, output_id
from lumen_ray.serve.batches.work import BatchWork, not_asked, read_item
from lumen_ray.serve.http import Overloaded, Unavailable, failed_message, logger
from lumen_ray.serve.job import sender
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire.images import image_bytes


class _Stop(NamedTuple):
    """Why the lines of a batch are no longer asked, and how the batch ends."""

    end: Status
    message: str


#: by the code in the file of errors, which is OpenAI's
_STOPPED = {
    "batch_cancelled": _Stop("cancelled", "the batch was cancelled before this request was answered"),
    "batch_expired": _Stop("expired", "the completion window ended before this request was answered"),
}
#: times that a line is asked whose replica dies or whose time is over, while the model is ready
_TRIES = 3
#: fragments of a batch that are open: the next one begins while the last lines of another are answered
_OPEN_FRAGMENTS = 2
#: seconds before the folder, or a batch that could not go on, is tried again
_AGAIN_S = 5.0
_SWEEP_EVERY_S = 3600.0
#: seconds between looks at the folder without being woken, as by another replica of one_process
_LOOK_EVERY_S = 5.0


class _Lost(Exception):
    """Another process has taken the claim, as after a pause of this one."""


@dataclass
class _Job:
    """A batch whose lines are being answered."""

    batch: Batch
    state: BatchState
    work: BatchWork
    publishing: asyncio.Lock = field(default_factory=asyncio.Lock)


class BatchRunner:
    """Answers the batches of a folder, oldest first, `settings.batches.at_once` of them at a time."""

    def __init__(
        self,
        file_store: FileStore,
        batch_store: BatchStore,
        backend: Backend,
        settings: ServeSettings,
        clock: Clock = time.time,
    ):
        assert settings.batches is not None, "the server takes batches"
        self._files, self._batches, self._backend = file_store, batch_store, backend
        self._settings, self._limits, self._clock = settings, settings.batches, clock
        self._slots = asyncio.Semaphore(settings.batches.in_flight)
        self._woken = asyncio.Event()
        self._claim: Claim | None = None

    def wake(self) -> None:
        """A batch was created or is to be cancelled."""
        self._woken.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        sender.set("batches")  # together they get their turn of the model as one user does
        told = ""
        while True:
            try:
                with Claim(self._limits.folder) as self._claim:
                    told = ""
                    await self._work()
            except (_Lost, UserError) as error:
                if (why := getattr(error, "reason", "lost")) != told:  # once, not every few seconds
                    told = why
                    logger.warning("batches wait: %s", error)
            except Exception:
                logger.exception("batches begin again")
            await asyncio.sleep(_AGAIN_S)

    async def _work(self) -> None:
        running: dict[str, asyncio.Task[None]] = {}
        swept = -_SWEEP_EVERY_S
        try:
            while True:
                self._woken.clear()
                self._check_claim()
                running = {batch_id: task for batch_id, task in running.items() if not task.done()}
                waiting = await asyncio.to_thread(list, self._batches.unfinished())
                for batch in waiting:
                    if batch.id not in running and len(running) < self._limits.at_once:
                        running[batch.id] = task = asyncio.create_task(self._advance(batch))
                        task.add_done_callback(lambda _: self.wake())
                if time.monotonic() > swept + _SWEEP_EVERY_S:
                    swept = time.monotonic()
                    await asyncio.to_thread(self._files.sweep, {batch.input_file_id for batch in waiting})
                    await asyncio.to_thread(self._batches.sweep)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S):  # `wait_for` of Python 3.11 may lose a cancellation
                        await self._woken.wait()
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    def _check_claim(self) -> None:
        if self._claim is None or self._claim.is_lost:
            raise _Lost(f"another process answers the batches in '{self._limits.folder}' now")

    async def _advance(self, batch: Batch) -> None:
        """Takes a batch to its end, through what passes by itself: a model that is restarted, a disk that is full."""
        while True:
            try:
                await self._answer(batch)
                return
            except _Lost:
                return
            except (Overloaded, Unavailable, TimeoutError, UserError) as error:
                logger.warning("%s waits: %s", batch.id, error or type(error).__name__)
            except Exception:
                logger.exception("%s failed", batch.id)
                with suppress(UserError):  # of the folder's disk
                    await self._fail(batch, Problem(code="internal_error", message=failed_message(batch.id)))
                    return
            await asyncio.sleep(_AGAIN_S)

    async def _fail(self, batch: Batch, problem: Problem) -> None:
        state = await asyncio.to_thread(self._batches.state, batch.id)
        await self._save(batch, state.enter("failed", self._now(), problems=[problem]))
        await asyncio.to_thread(self._batches.remove_work, batch.id)

    async def _answer(self, batch: Batch) -> None:
        """Takes a batch from the state that it is in to its end."""
        state = await asyncio.to_thread(self._batches.state, batch.id)
        work = BatchWork(self._files.content(batch.input_file_id), self._batches.work(batch.id))
        if state.status == "validating":
            state = await self._validated(batch, state, work)
        if state.status == "in_progress":
            state = await self._answered(batch, state, work)
        if state.status == "finalizing":
            await self._finalized(batch, state, work)
        await asyncio.to_thread(self._batches.remove_work, batch.id)

    async def _validated(self, batch: Batch, state: BatchState, work: BatchWork) -> BatchState:
        most, longest = self._limits.max_lines, self._settings.limits.max_body_bytes
        problems, total = await asyncio.to_thread(work.validate, most, longest)
        counts = state.counts.model_copy(update={"total": total})
        why = await self._why_stopped(batch)
        if problems:
            state = state.enter("failed", self._now(), problems=problems, counts=counts)
        elif why is not None:
            state = state.enter(_STOPPED[why].end, self._now(), counts=counts)
        else:
            state = state.enter("in_progress", self._now(), counts=counts)
        await self._save(batch, state)
        return state

    async def _answered(self, batch: Batch, state: BatchState, work: BatchWork) -> BatchState:
        """The state behind the last line. Lines that were answered before a kill are not asked again."""
        counts = await asyncio.to_thread(work.counts, state.counts.total)
        job = _Job(batch, state.with_facts(counts=counts), work)
        waiting = await asyncio.to_thread(work.waiting)
        room = asyncio.Semaphore(_OPEN_FRAGMENTS)
        with _first_error():
            async with asyncio.TaskGroup() as group:
                while (fragment := await asyncio.to_thread(next, waiting, None)) is not None:
                    await room.acquire()
                    task = group.create_task(self._answer_fragment(job, fragment))
                    task.add_done_callback(lambda _: room.release())
        state = job.state.enter("finalizing", self._now())
        await self._save(batch, state)
        return state

    async def _reader(self, batch: Batch) -> LineReader | None:
        """Reads lines for the model that is served now, which is waited for; None if the batch is stopped before there
        is one."""
        while True:
            try:
                info = await self._backend.info()
                break
            except (Overloaded, Unavailable, TimeoutError):
                if await self._why_stopped(batch) is not None:
                    return None
                await asyncio.sleep(_AGAIN_S)
        settings = self._settings
        return LineReader(
            *(info["preset"], info["version"], info["tasks"], info.get("largest_side")),
            *(settings.limits, settings.defaults),
            takes_sampling=settings.openai_sampling,
            read_image=lambda _: image_bytes,  # the client's file, which may not name files of the server
        )

    async def _answer_fragment(self, job: _Job, fragment: Fragment) -> None:
        with _first_error():
            async with asyncio.TaskGroup() as group:  # no line is still with the model when the fragment is given up
                tasks = [group.create_task(self._answer_line(job, item)) for item in fragment.items]
        lines = [task.result() for task in tasks]
        async with job.publishing:
            self._check_claim()
            await asyncio.to_thread(job.work.publish, fragment, lines)
            failed, before = sum(bool(line.reason) for line in lines), job.state.counts
            counts = before.model_copy(
                update={"completed": before.completed + len(lines) - failed, "failed": before.failed + failed}
            )
            job.state = job.state.with_facts(counts=counts)
            await self._save(job.batch, job.state)

    async def _answer_line(self, job: _Job, item: Item) -> Line:
        async with self._slots:
            reader = await self._reader(job.batch)
            if (why := await self._why_stopped(job.batch)) is not None:
                return await asyncio.to_thread(not_asked, item, why, _STOPPED[why].message)
            assert reader is not None, "a batch without a model was stopped"
            line = await asyncio.to_thread(lambda: reader.read(item, read_item(item)))
            if not line.reason:
                line = await self._ask(job, line, reader.model)
            line.forget()
            return line

    async def _ask(self, job: _Job, line: Line, model: str) -> Line:
        """The line, answered or failed. What passes by itself is waited for: a full queue, a replica that is gone."""
        prepared = line.prepared
        assert prepared is not None, "lines that failed are not asked"
        tries = 0
        while True:
            try:
                choices = prepared.known or await self._backend.infer(
                    prepared.shown, prepared.requests, prepared.max_new_tokens
                )
                model = choices[0].model or model
                await asyncio.to_thread(line.answer, choices, model)
                job.state = job.state.with_facts(model=model)
                return line
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s)
            except (Unavailable, TimeoutError) as error:
                tries += 1
                if tries == _TRIES:
                    line.fail(_given_up(error))
                    return line
                await self._until_ready(job)
            except UserError as error:
                line.fail(error)
                return line
            except Exception:
                where = f"{job.batch.id}, {line.item.image_id}"
                logger.exception("%s failed", where)
                line.fail(UserError(failed_message(where), "internal_error"))
                return line
            if (why := await self._why_stopped(job.batch)) is not None:
                return await asyncio.to_thread(not_asked, line.item, why, _STOPPED[why].message)

    async def _until_ready(self, job: _Job) -> None:
        """Waits for the model, as long as the batch is wanted."""
        while not all((await self._backend.ready()).values()):
            if await self._why_stopped(job.batch) is not None:
                return
            await asyncio.sleep(1)

    async def _finalized(self, batch: Batch, state: BatchState, work: BatchWork) -> None:
        totals, usage, answers, errors = await asyncio.to_thread(work.finish)
        end: Status = "expired" if "batch_expired" in totals["reasons"] else "completed"
        if await asyncio.to_thread(self._batches.cancelling_at, batch.id) is not None:
            end = "cancelled"
        self._check_claim()
        output = await self._adopted(batch, answers, "output") if totals["labelled"] else None
        failed = await self._adopted(batch, errors, "error") if totals["errors"] else None
        counts = state.counts.model_copy(update={"completed": totals["labelled"], "failed": totals["errors"]})
        state = state.enter(
            end, self._now(), output_file_id=output, error_file_id=failed, usage=usage, counts=counts
        )  # fmt: skip
        await self._save(batch, state)

    async def _adopted(self, batch: Batch, path: Path, kind: str) -> str:
        """The id of an output file of a batch."""
        file_id, name = output_id(batch.id, kind), f"{batch.id}_{kind}.jsonl"
        await asyncio.to_thread(self._files.adopt, path, file_id, batch.owner, name, batch.output_lifetime_s)
        return file_id

    async def _save(self, batch: Batch, state: BatchState) -> None:
        self._check_claim()
        await asyncio.to_thread(self._batches.save, batch.id, state)

    async def _why_stopped(self, batch: Batch) -> str | None:
        """Why no more lines of a batch are asked, a key of `_STOPPED`; None if they are."""
        try:
            cancelled_at = await asyncio.to_thread(self._batches.cancelling_at, batch.id)
        except UserError as error:  # once more, before the lines that the model has are given up
            logger.warning("%s waits: %s", batch.id, error)
            await asyncio.sleep(_AGAIN_S)
            cancelled_at = await asyncio.to_thread(self._batches.cancelling_at, batch.id)
        if cancelled_at is not None:
            return "batch_cancelled"
        return "batch_expired" if self._clock() >= batch.expires_at else None

    def _now(self) -> int:
        return int(self._clock())


@contextmanager
def _first_error() -> Iterator[None]:
    """Raises the first error of a task group by itself."""
    try:
        yield
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _given_up(error: Unavailable | TimeoutError) -> UserError:
    if isinstance(error, TimeoutError):
        return UserError("the model did not answer in time; ask for less or try again", "timeout")
    return UserError(str(error), "unavailable")
