"""Requests of several callers in one forward pass, so that none of them notices the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from lumen_ray.errors import UserError
from lumen_ray.serve.http import logger

T = TypeVar("T")
R = TypeVar("R")


def run_grouped(
    items: Sequence[T], key: Callable[[T], Hashable], run: Callable[[list[T]], list[R]]
) -> list[R | Exception]:
    """`run` on the items that share a `key`, group by group; results in the order of `items`.

    `run` takes some items and gives as many results. An item on which it fails gets the exception as its result.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(key(item), []).append(row)
    results: dict[int, R | Exception] = {}
    for members in rows.values():
        results.update(zip(members, _run_isolated([items[row] for row in members], run), strict=True))
    return [results[row] for row in range(len(items))]


def _run_isolated(items: list[T], run: Callable[[list[T]], list[R]]) -> list[R | Exception]:
    """`run` on all items; when that fails on each alone, so that the others still get their result."""
    try:
        return run(items)
    except Exception as error:  # whatever one item caused must not reach the others
        if len(items) == 1:
            if not isinstance(error, UserError):
                logger.exception("a request failed in the model")
            return [error]
    return [result for item in items for result in _run_isolated([item], run)]


def value_of(result: R | Exception) -> R:
    """The result of one row, or its exception raised: `serve.batch` hands both back as values."""
    if isinstance(result, Exception):
        raise result
    return result
