"""Requests of several callers in one forward pass; the failure of one does not reach the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lumen_ray.cancellation import Cancelled, wanted_while
from lumen_ray.errors import UserError
from lumen_ray.inference.fair_share import acting_for
from lumen_ray.serve.http import logger
from lumen_ray.serve.metrics import BATCH_SIZE, BATCH_WAIT_SECONDS, PASS_SECONDS

T = TypeVar("T")
R = TypeVar("R")


#: Batches at a time where one that leaves the model keeps its thread until its end: above the requests that Serve lets
#: into a replica, so that those that leave keep no other one waiting. Threads are made as they are needed.
MANY = 1024


@dataclass
class _Waiting(Generic[T, R]):
    item: T
    key: Hashable
    cost: int
    owner: Hashable
    since: float
    future: Future[R | Exception] = field(default_factory=Future)
    is_gone: bool = False  # whether the caller has left


class Collector(Generic[T, R]):
    """Batches for a model that one thread uses at a time: a worker that gets the model takes everything that waits. The
    next batch is taken when this one is done, or at once if it leaves the model to others while it goes on: between
    passes, and for text answers, which are written together with theirs.

    `serve.batch` closes a batch some milliseconds after its first item, also while the model is busy."""

    def __init__(
        self,
        run: Callable[[list[T]], list[R | Exception]],
        key: Callable[[T], Hashable],
        cost: Callable[[T], int] = lambda _: 0,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
        workers: int = 1,
        stage: str = "trunk",
        owner: Callable[[T], Hashable] = lambda _: object(),
        leaves: Callable[[T], bool] = lambda _: False,
    ):
        """`run`: the results of a batch, whose items share a `key`; `cost`: the tokens of an item; `turn`: waits for
        the model, not needed by a single worker; `workers`: most batches at a time; `stage`: name in metrics; `owner`:
        whom an item is for. Owners are served in turn. `leaves`: whether a batch of such items leaves the model to
        others."""
        self._stage = stage
        self._run, self._key, self._cost, self._turn, self._owner = run, key, cost, turn, owner
        self._leaves = leaves
        self._pool = ThreadPoolExecutor(workers)
        self._waiting: deque[_Waiting[T, R]] = deque()
        self._lock = threading.Lock()  # of `_waiting`
        self._entry = threading.Lock()  # a batch that were taken while another one has the model would be a small one
        self.max_batch_size = self.max_batch_tokens = 1
        self.wait_timeout_s = 0.0

    def configure(self, batching: dict[str, Any]) -> None:
        """Applies the settings of `settings.Batching`."""
        self.max_batch_size = batching["max_batch_size"]
        self.max_batch_tokens = batching["max_batch_tokens"]
        self.wait_timeout_s = batching["batch_wait_timeout_s"]

    async def submit(self, item: T) -> R | Exception:
        """The result of one item. If this is cancelled while the item waits, it is dropped; while its batch runs, that
        is given up once all its callers have left."""
        waiting: _Waiting[T, R] = _Waiting(item, self._key(item), self._cost(item), self._owner(item), time.monotonic())
        with self._lock:
            self._waiting.append(waiting)
        self._pool.submit(self._work)
        try:
            return await asyncio.wrap_future(waiting.future)
        except asyncio.CancelledError:
            waiting.is_gone = True
            raise

    def _work(self) -> None:
        """Runs a batch. There is a call for every item, so calls whose item is in another's batch find less or none."""
        with self._lock:
            if not self._waiting:
                return
            until = self._waiting[0].since + self.wait_timeout_s
        time.sleep(max(0.0, until - time.monotonic()))  # others may come while the model is idle
        batch: list[_Waiting[T, R]] = []
        results: list[R | Exception]
        try:
            with ExitStack() as entry:
                entry.enter_context(self._entry)
                with self._turn():
                    batch = self._take()
                if batch and self._leaves(batch[0].item):
                    entry.close()
                is_wanted = wanted_while(lambda: not all(waiting.is_gone for waiting in batch))
                with is_wanted, acting_for([waiting.owner for waiting in batch]):
                    results = self._measured(batch) if batch else []
        except Exception as error:
            batch = batch or self._take()
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            waiting.future.set_result(result)

    def _measured(self, batch: list[_Waiting[T, R]]) -> list[R | Exception]:
        now = time.monotonic()
        BATCH_SIZE.record(len(batch), stage=self._stage)
        for waiting in batch:
            BATCH_WAIT_SECONDS.record(now - waiting.since, stage=self._stage)
        with PASS_SECONDS.timed(stage=self._stage):
            return self._run([waiting.item for waiting in batch])

    def _take(self) -> list[_Waiting[T, R]]:
        """The first item that waits and those of its key, in the order of `_by_turns`, as many as fit."""
        batch: list[_Waiting[T, R]] = []
        others: list[_Waiting[T, R]] = []
        tokens = 0
        with self._lock:
            self._waiting = deque(_by_turns(self._waiting))
            while self._waiting and len(batch) < self.max_batch_size:
                waiting = self._waiting.popleft()
                cost = tokens + waiting.cost
                if batch and (waiting.key != batch[0].key or cost > self.max_batch_tokens):
                    others.append(waiting)
                elif waiting.future.set_running_or_notify_cancel():
                    batch.append(waiting)
                    tokens = cost
            self._waiting.extendleft(reversed(others))
        return batch


def _by_turns(waiting: Iterable[_Waiting[T, R]]) -> list[_Waiting[T, R]]:
    """The first item of each owner, then the second of each, and so on; else in their order."""
    seen: Counter[Hashable] = Counter()
    rounds: list[tuple[int, _Waiting[T, R]]] = []
    for one in waiting:
        rounds.append((seen[one.owner], one))
        seen[one.owner] += 1
    return [one for _, one in sorted(rounds, key=lambda entry: entry[0])]


def map_grouped(
    items: Sequence[T], key: Callable[[T], Hashable], function: Callable[[list[T]], list[R]]
) -> list[R | Exception]:
    """Applies `function` to the items that share a `key`, group by group; results in the order of `items`.

    `function` maps a list of items to as many results. An item on which it fails gets the exception as its result.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    results: dict[int, R | Exception] = {}
    for members in groups.values():
        found = _map_isolated([items[i] for i in members], function)
        results.update(zip(members, found, strict=True))
    return [results[i] for i in range(len(items))]


def _map_isolated(items: list[T], function: Callable[[list[T]], list[R]]) -> list[R | Exception]:
    """Applies `function` to all items; if that fails, to each alone, so that the others still get their result."""
    try:
        return [*function(items)]
    except Cancelled as error:
        return [error] * len(items)
    except Exception as error:  # whatever one item caused must not reach the others
        if len(items) == 1:
            if not isinstance(error, UserError):
                logger.exception("a request failed in the model")
            return [error]
    return [result for item in items for result in _map_isolated([item], function)]


def value_of(result: R | Exception) -> R:
    """The result of one item, or its exception raised: a batch has both as values."""
    if isinstance(result, Exception):
        raise result
    return result
