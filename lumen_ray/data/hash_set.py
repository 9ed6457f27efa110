"""A set of very many values, of which hashes are kept."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def hash_of(value: Any) -> int:
    """64 bits, the same in every process, from the value's `repr`."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")


class HashSet:
    """A set of 64-bit hashes in 8 bytes each: sorted arrays of growing length, merged when they are as long.

    Two of a hundred million values share a hash with a probability of 0.0003.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __contains__(self, value: int) -> bool:
        wanted = np.uint64(value)
        places = ((run, np.searchsorted(run, wanted)) for run in self._runs)
        return any(place < len(run) and run[place] == wanted for run, place in places)

    def add(self, hashes: list[int]) -> list[bool]:
        """Adds hashes in order; for each, whether it was in the set."""
        new = np.array(hashes, np.uint64)
        known = np.zeros(len(new), bool)
        for run in self._runs:
            place = np.searchsorted(run, new).clip(max=len(run) - 1)
            known |= run[place] == new
        values, first = np.unique(new, return_index=True)
        is_first = np.zeros(len(new), bool)
        is_first[first] = True
        fresh = values[~known[first]]
        if len(fresh):
            self._runs.append(fresh)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]))
        return (known | ~is_first).tolist()
