"""Requests of several callers in one forward pass; the failure of one does not reach the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar, cast

from lumen_ray.errors import UserError
from lumen_ray.serve.http import logger

T = TypeVar("T")
R = TypeVar("R")


class Batched(Protocol):
    """The part of a `serve.batch` method that Ray's types leave out."""

    def set_max_batch_size(self, new_max_batch_size: int) -> None: ...

    def set_batch_wait_timeout_s(self, new_batch_wait_timeout_s: float) -> None: ...


def set_batching(method: Any, batching: dict[str, Any]) -> None:
    """Applies the settings of `settings.Batching` to a `serve.batch` method."""
    batched = cast(Batched, method)
    batched.set_max_batch_size(batching["max_batch_size"])
    batched.set_batch_wait_timeout_s(batching["batch_wait_timeout_s"])


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
    except Exception as error:  # whatever one item caused must not reach the others
        if len(items) == 1:
            if not isinstance(error, UserError):
                logger.exception("a request failed in the model")
            return [error]
    return [result for item in items for result in _map_isolated([item], function)]


def value_of(result: R | Exception) -> R:
    """The result of one item, or its exception raised: `serve.batch` returns both as values."""
    if isinstance(result, Exception):
        raise result
    return result
