"""Which fragment of a job has labelled an image of given bytes: an index of content hashes, in memory.

Images are known by the first 8 bytes of the SHA-256 of their encoded bytes, so a hit is a candidate: whoever asks
compares the whole hash. The index is derived from the published labels and can be lost at any time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc

from lumen_ray.errors import UserError
from lumen_ray.label.ledger import Ledger

#: seconds that a worker waits for an index that does not answer
ANSWER_S = 20.0
#: after which it asks no more for so many seconds, and so many times as long as it has waited
PAUSE_S, PAUSE_PER_S = 1.0, 3.0
_READ_AT_ONCE, _READ_AHEAD = 16, 512


class Index(Protocol):
    """`find` and `add` of `ContentIndex`, in this process or another."""

    def find(self, keys: np.ndarray) -> np.ndarray: ...

    def add(self, keys: np.ndarray, fragment: int) -> None: ...


def content_keys(digests: Sequence[str]) -> np.ndarray:
    """uint64 [N], the first 8 bytes of SHA-256 digests in hexadecimal."""
    return np.array([int(digest[:16], 16) for digest in digests], np.uint64)


class KeyTable:
    """A map of uint64 keys to uint32 values in 12 bytes each, 32 at moments of its growth: sorted arrays of growing
    length, merged when they are as long. A key keeps its first value."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64 [N]: the value of each key, -1 where there is none."""
        found = np.full(len(keys), -1, np.int64)
        for known, values in self._runs:
            place = np.searchsorted(known, keys).clip(max=len(known) - 1)
            found = np.where(known[place] == keys, values[place], found)
        return found

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Adds keys uint64 [N] with values uint32 [N]."""
        keys, first = np.unique(keys, return_index=True)
        is_new = self.find(keys) < 0
        if not is_new.any():
            return
        self._runs.append((keys[is_new], values[first][is_new]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            short = self._runs.pop()
            self._runs[-1] = _merged(self._runs[-1], short)


def _merged(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two runs without common keys as one."""
    place = np.searchsorted(a[0], b[0])
    place += np.arange(len(place))
    is_old = np.ones(len(a[0]) + len(place), bool)
    is_old[place] = False
    merged = []
    for old, new in zip(a, b, strict=True):
        joined = np.empty(len(is_old), old.dtype)
        joined[is_old], joined[place] = old, new
        merged.append(joined)
    return merged[0], merged[1]


class ContentIndex:
    """The index of the job that writes the folder `output`, filled from the labels that it has published."""

    def __init__(self, output: str):
        self._table = KeyTable()
        self._ledger = Ledger(output)
        done = sorted(self._ledger.done())
        with ThreadPoolExecutor(_READ_AT_ONCE, "label-index") as pool:
            for start in range(0, len(done), _READ_AHEAD):
                block = done[start : start + _READ_AHEAD]
                for fragment, keys in zip(block, pool.map(self._published, block), strict=True):
                    self.add(keys, fragment)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64 [N]: the fragment in which each key (uint64) was labelled, -1 if none is known."""
        return self._table.find(keys)

    def add(self, keys: np.ndarray, fragment: int) -> None:
        """Adds the keys (uint64 [N]) of the images that a published fragment has labelled itself, without copying."""
        self._table.add(keys, np.full(len(keys), fragment, np.uint32))

    def _published(self, fragment: int) -> np.ndarray:
        try:
            table = self._ledger.table(fragment, ["sha256", "duplicate_of"])
        except UserError:  # unreadable: its images are labelled again where they come up
            return np.zeros(0, np.uint64)
        own = table.filter(pc.and_(table["sha256"].is_valid(), table["duplicate_of"].is_null()))
        return content_keys(own["sha256"].unique().to_pylist())


class RemoteIndex:
    """A `ContentIndex` in a Ray actor, as a worker sees it.

    The index may be away, while Ray restarts it or it reads what has been published: nothing is known then, and images
    are labelled again. What was added meanwhile waits for it, or is among the published labels that it reads.
    """

    def __init__(self, actor: Any):
        self._actor = actor
        self._asks_again = 0.0

    @classmethod
    def start(cls, output: str) -> RemoteIndex:
        """Starts the actor, which lives as long as this object and the workers' copies of it."""
        import ray

        return cls(ray.remote(ContentIndex).options(num_cpus=0, max_restarts=-1).remote(output))

    def find(self, keys: np.ndarray) -> np.ndarray:
        import ray

        asked = time.monotonic()
        if asked >= self._asks_again:
            try:
                return ray.get(self._actor.find.remote(keys), timeout=ANSWER_S)
            except ray.exceptions.RayError:
                now = time.monotonic()
                self._asks_again = now + PAUSE_S + PAUSE_PER_S * (now - asked)
        return np.full(len(keys), -1, np.int64)

    def add(self, keys: np.ndarray, fragment: int) -> None:
        self._actor.add.remote(keys, fragment)  # one process's calls are done in order: a later `find` sees these
