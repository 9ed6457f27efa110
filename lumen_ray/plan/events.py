"""A discrete-event simulation: a clock, processes, and resources that their users share.

A process is a generator that yields what it waits for. Resources such as the cores of a machine or the bandwidth of a
store are divided among all that use them at a time (processor sharing), which libraries for simulation with queues of
slots do not model.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

Resume = Callable[[Any], None]
#: what a process yields: takes a function that continues the process
Wait = Callable[[Resume], None]
Process = Generator[Wait, Any, None]


class Simulation:
    """The clock, `now` in seconds, and the events to come."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Resume]] = []
        self._order = count()  # events of one time happen in the order in which they were made

    def after(self, delay: float, resume: Resume) -> None:
        """Calls `resume` in `delay` seconds."""
        heapq.heappush(self._events, (self.now + delay, next(self._order), resume))

    def sleep(self, seconds: float) -> Wait:
        return lambda resume: self.after(seconds, resume)

    def start(self, process: Process) -> Wait:
        """Starts a process. The result waits for its end."""
        waiting: list[Resume] = []
        is_over = False

        def step(value: Any) -> None:
            nonlocal is_over
            try:
                wait = process.send(value)
            except StopIteration:
                is_over = True
                for resume in waiting:
                    self.after(0.0, resume)
                return
            wait(step)

        def joined(resume: Resume) -> None:
            if is_over:
                self.after(0.0, resume)
            else:
                waiting.append(resume)

        self.after(0.0, step)
        return joined

    def run(self, until: Callable[[], bool]) -> None:
        """Runs until a condition is met, or nothing is left to happen."""
        while self._events and not until():
            self.now, _, resume = heapq.heappop(self._events)
            resume(None)


class Queue:
    """A queue of at most `room` values; processes wait to put one in and to take one out."""

    def __init__(self, simulation: Simulation, room: float = float("inf")):
        self._simulation, self._room = simulation, room
        self._values: deque[Any] = deque()
        self._takers: deque[Resume] = deque()
        self._givers: deque[tuple[Any, Resume]] = deque()

    def put(self, value: Any) -> Wait:
        def wait(resume: Resume) -> None:
            self._givers.append((value, resume))
            self._match()

        return wait

    def take(self) -> Wait:
        def wait(resume: Resume) -> None:
            self._takers.append(resume)
            self._match()

        return wait

    def _match(self) -> None:
        while True:
            if self._values and self._takers:
                value, taker = self._values.popleft(), self._takers.popleft()
                self._simulation.after(0.0, lambda _, value=value, taker=taker: taker(value))  # type: ignore[misc]
            elif self._givers and len(self._values) < self._room:
                value, resume = self._givers.popleft()
                self._values.append(value)
                self._simulation.after(0.0, resume)
            else:
                return


class Shared:
    """A resource that does `capacity` of work per second, e.g. cores or bytes per second.

    A user works at its `rate` at most; if the rates of all exceed the capacity, all are slowed down by one factor.
    `done`: work by kind that has ended.
    """

    def __init__(self, simulation: Simulation, capacity: float):
        self._simulation, self.capacity = simulation, capacity
        self.done: Counter[str] = Counter()
        self._users: list[tuple[float, int, float, float, str, Resume]] = []
        self._order = count()
        self._rates = 0.0
        self._virtual = 0.0  # seconds of an undisturbed user that have passed; all users end in the order of theirs
        self._since = 0.0
        self._version = 0

    def use(self, work: float, rate: float = 1.0, kind: str = "") -> Wait:
        """Waits until `work` is done at `rate` per second at most."""

        def wait(resume: Resume) -> None:
            self._advance()
            entry = (self._virtual + work / rate, next(self._order), rate, work, kind, resume)
            heapq.heappush(self._users, entry)
            self._rates += rate
            self._plan()

        return wait

    def _speed(self) -> float:
        return min(1.0, self.capacity / self._rates) if self._rates > 1e-12 else 1.0

    def _advance(self) -> None:
        now = self._simulation.now
        self._virtual += (now - self._since) * self._speed()
        self._since = now

    def _plan(self) -> None:
        """Schedules the end of the user that ends first; earlier schedules are void."""
        self._version += 1
        if not self._users:
            self._rates = 0.0  # sums of floats do not return to zero by themselves
            return
        version = self._version
        delay = max(0.0, (self._users[0][0] - self._virtual) / self._speed())
        self._simulation.after(delay, lambda _: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        finish, _, rate, work, kind, resume = heapq.heappop(self._users)
        self._virtual = max(self._virtual, finish)
        self._rates -= rate
        self.done[kind] += work  # type: ignore[assignment]
        self._plan()
        self._simulation.after(0.0, resume)
