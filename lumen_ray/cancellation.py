"""Giving up work that nobody waits for any more, between two passes of a model.

Whoever runs a model for others sets `wanted_while`; loops over passes call `check_wanted` between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Cancelled(Exception):
    """Raised in work whose result nobody waits for."""


def _always() -> bool:
    return True


_is_wanted: ContextVar[Callable[[], bool]] = ContextVar("is_wanted", default=_always)


@contextmanager
def wanted_while(is_wanted: Callable[[], bool]) -> Iterator[None]:
    """Work of this thread inside is given up once `is_wanted` is false."""
    token = _is_wanted.set(is_wanted)
    try:
        yield
    finally:
        _is_wanted.reset(token)


def current() -> Callable[[], bool]:
    """Whether the work of this thread is wanted, to be asked from other threads too."""
    return _is_wanted.get()


def check_wanted() -> None:
    """Raises `Cancelled` if the work of this thread is no longer wanted."""
    if not _is_wanted.get()():
        raise Cancelled("nobody waits for this any more")
