"""Between two passes of a model: giving up work that nobody waits for any more, and letting others have the model.

Whoever runs a model for others sets `wanted_while` and `giving_way`; loops over passes call `between_passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """Raised in work whose result nobody waits for."""


def _always() -> bool:
    return True


def _keep() -> None:
    """Nobody else uses the model."""


_give_way: ContextVar[Callable[[], None]] = ContextVar("give_way", default=_keep)
_is_wanted: ContextVar[Callable[[], bool]] = ContextVar("is_wanted", default=_always)


def wanted_while(is_wanted: Callable[[], bool]) -> AbstractContextManager[None]:
    """Work of this thread inside is given up once `is_wanted` is false."""
    return _set_to(_is_wanted, is_wanted)


def giving_way(give_way: Callable[[], None]) -> AbstractContextManager[None]:
    """Work of this thread inside calls `give_way` between its passes, which returns when it may go on."""
    return _set_to(_give_way, give_way)


@contextmanager
def _set_to(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def current() -> Callable[[], bool]:
    """Whether the work of this thread is wanted, to be asked from other threads too."""
    return _is_wanted.get()


def check_wanted() -> None:
    """Raises `Cancelled` if the work of this thread is no longer wanted."""
    if not _is_wanted.get()():
        raise Cancelled("nobody waits for this any more")


def between_passes() -> None:
    """Lets others have the model that this thread uses. Raises `Cancelled` if its work is no longer wanted."""
    check_wanted()
    _give_way.get()()
    check_wanted()
