"""A model that several threads use in turns: who comes next, and passes between which others get it.

The next turn is of whoever has had the least of the model (start-time fair queueing, Goyal et al. 1997): each owner has
a virtual time, the seconds of the model that it has used, and one that comes anew starts where an owner that always had
work would be by now. So a cheap request goes before the next pass of an expensive one, and an expensive one is not put
off for ever: while it waits, newcomers start further and further behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

from lumen_ray.cancellation import giving_way

_owners: ContextVar[tuple[Hashable, ...]] = ContextVar("owners", default=())


@contextmanager
def acting_for(owners: Sequence[Hashable]) -> Iterator[None]:
    """Turns of this thread inside are counted to `owners`, in equal parts."""
    token = _owners.set(tuple(dict.fromkeys(owners)))
    try:
        yield
    finally:
        _owners.reset(token)


@dataclass(eq=False)
class Ticket:
    """A place in the line. `start`: the virtual time at which it was drawn."""

    owners: tuple[Hashable, ...]
    start: float


class FairShare:
    """The line for a model. Not thread-safe: its user holds a lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._now = clock()
        self._virtual = 0.0
        self._used: dict[Hashable, float] = {}  # virtual time by owner, of those ahead of `_virtual` or in the line
        self._line: list[Ticket] = []
        self.turn: Ticket | None = None
        self._began = 0.0

    def draw(self) -> Ticket:
        """A place in the line for this thread, see `acting_for`; without owners it is an owner of its own."""
        self._advance()
        ticket = Ticket(_owners.get() or (object(),), self._virtual)
        self._line.append(ticket)
        return ticket

    def is_next(self, ticket: Ticket) -> bool:
        return min(self._line, key=self._virtual_time) is ticket  # the first drawn of equal ones

    def begin(self, ticket: Ticket) -> None:
        """The turn of a ticket begins."""
        self._advance()
        self.leave(ticket)
        self.turn, self._began = ticket, self._now

    def end(self, goes_on: bool = False) -> None:
        """The turn ends. `goes_on`: its ticket stands in the line again, for the next pass."""
        self._advance()
        ticket, self.turn = self.turn, None
        assert ticket is not None, "a turn has begun"
        share = (self._now - self._began) / len(ticket.owners)
        for owner in ticket.owners:
            self._used[owner] = self._of(ticket, owner) + share
        if goes_on:
            self._line.append(ticket)
        waiting = {owner for other in self._line for owner in other.owners}
        self._used = {o: used for o, used in self._used.items() if used > self._virtual or o in waiting}

    def leave(self, ticket: Ticket) -> None:
        """Takes a ticket out of the line."""
        self._line.remove(ticket)

    def _virtual_time(self, ticket: Ticket) -> float:
        return min(self._of(ticket, owner) for owner in ticket.owners)

    def _of(self, ticket: Ticket, owner: Hashable) -> float:
        return max(ticket.start, self._used.get(owner, ticket.start))

    def _advance(self) -> None:
        now = self._clock()
        tickets = [*self._line, *([] if self.turn is None else [self.turn])]
        active = {owner for ticket in tickets for owner in ticket.owners}
        self._virtual += (now - self._now) / max(1, len(active))
        self._now = now


class SharedModel:
    """A model without text answers, for one thread at a time (`DecodeLoop` is the one of a trunk). Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._share = FairShare()
        self._since: float | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The model for this thread; others may have it at `cancellation.between_passes`."""
        with self._changed:
            ticket = self._share.draw()
            self._take(ticket)
        try:
            with giving_way(partial(self._give_way, ticket)):
                yield
        finally:
            with self._changed:
                self._release(ticket)

    def busy_s(self) -> float:
        """Seconds since the current pass began; 0 between passes."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _give_way(self, ticket: Ticket) -> None:
        with self._changed:
            self._release(ticket, goes_on=True)
            self._take(ticket)

    def _take(self, ticket: Ticket) -> None:
        try:
            self._changed.wait_for(lambda: self._since is None and self._share.is_next(ticket))
        except BaseException:
            self._share.leave(ticket)
            self._changed.notify_all()
            raise
        self._share.begin(ticket)
        self._since = time.monotonic()

    def _release(self, ticket: Ticket, goes_on: bool = False) -> None:
        if self._share.turn is not ticket:  # interrupted while others had the model
            return
        self._share.end(goes_on)
        self._since = None
        self._changed.notify_all()
