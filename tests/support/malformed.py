"""Bodies that are almost right: a value of another kind, a key too few or too many, bytes cut off."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]

#: values that a field may be given by mistake
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), "", " ", "a", "\x00", "\ud800", "a" * 5000),
    *([], {}, [[]], [None], {"a": {}}, [{}] * 40, "data:image/png;base64,", "http://127.0.0.1/", "[DET]", "../x"),
)


def places(body: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every value in a body."""
    yield path
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(body: Any, path: Path, value: Any) -> Any:
    """The body with another value at a path."""
    if not path:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[path[0]] = replaced(body[path[0]], path[1:], value)
    return copy


def without(body: Any, path: Path) -> Any:
    """The body without the key or the item at a path."""
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    kept = {k: v for k, v in parent.items() if k != path[-1]} if isinstance(parent, dict) else parent[: path[-1]]
    return replaced(body, path[:-1], kept)


def malformed(body: Any, rng: random.Random) -> bytes:
    """The bytes of a body with a mistake or two."""
    for _ in range(rng.randint(1, 2)):
        path = rng.choice([*places(body)])
        match rng.randrange(4):
            case 0 if path:
                body = without(body, path)
            case 1 if isinstance(body, dict):
                body = {**body, rng.choice(["image", "n", "x", "\ud800", "tools", "stream"]): rng.choice(VALUES)}
            case _:
                body = replaced(body, path, rng.choice(VALUES))
    data = json.dumps(body).encode()
    match rng.randrange(10):
        case 0:
            return data[: rng.randrange(len(data) + 1)]
        case 1:
            place = rng.randrange(len(data) + 1)
            return data[:place] + rng.randbytes(8) + data[place:]
    return data
