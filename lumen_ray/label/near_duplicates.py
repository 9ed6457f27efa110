"""Groups of images with equal bytes or with nearly equal perceptual hashes.

Hashes within `distance` bits of each other are found without comparing all pairs: if 64 bits are cut into
``distance + k`` blocks, two such hashes agree in all bits of at least `k` blocks. For every choice of `k` blocks the
hashes are sorted by these blocks, and those that agree there are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lumen_ray.errors import UserError

MOST_DISTANCE = 16
_BITS = 64
_MOST_AGREEING = 5
_COMPARISONS_PER_SORT_STEP = 2.0  # of a pair of hashes, in the time of sorting one by one bit


@dataclass(frozen=True)
class Groups:
    """`first`: int64 [N], for each image the number (from 0) of the first image of its group, itself if it is alone;
    `is_exact`: bool [N], an earlier image has the same bytes."""

    first: np.ndarray
    is_exact: np.ndarray

    @property
    def is_member(self) -> np.ndarray:
        """bool [N]: whether the image is in a group with others."""
        return np.bincount(self.first, minlength=len(self.first))[self.first] > 1

    @property
    def counts(self) -> dict[str, int]:
        """``groups``, and images in them beside the first: ``exact``, with the bytes of an earlier image, and
        ``near``."""
        later = self.first != np.arange(len(self.first))
        exact = int(self.is_exact.sum())
        groups = len(np.unique(self.first[later]))
        return {"groups": groups, "exact": exact, "near": int(later.sum()) - exact}


def find_groups(
    contents: np.ndarray, has_content: np.ndarray, hashes: np.ndarray, has_hash: np.ndarray, distance: int
) -> Groups:
    """The groups of N images: two are in one group if their contents are equal, their hashes differ in `distance` bits
    at most, or a chain of such images joins them.

    contents, hashes: uint64 [N]; has_content, has_hash: bool [N], False where it is not known. Memory: some 100 bytes
    an image.
    """
    parent = np.arange(len(contents))
    _join_equal(parent, contents, has_content)
    is_exact = parent != np.arange(len(parent))
    distinct, first = _join_equal(parent, hashes, has_hash)
    for a, b in near_pairs(distinct, distance):
        _join(parent, first[a], first[b])
    return Groups(_roots(parent, np.arange(len(parent))), is_exact)


def near_pairs(hashes: np.ndarray, distance: int, agreeing: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """Pairs (numbers int64 [P], int64 [P]) of different hashes, uint64 [N], that differ in `distance` bits at most; a
    pair may come several times.

    agreeing: blocks in which hashes must agree to be compared; None: the number that makes the least work.
    """
    agreeing = agreeing or _agreeing(len(hashes), distance)
    blocks = _blocks(distance + agreeing)
    for chosen in combinations(blocks, agreeing):
        keys = hashes & np.bitwise_or.reduce(np.array(chosen, np.uint64))
        order = np.argsort(keys)
        keys = keys[order]
        offset = 1
        at = np.flatnonzero(keys[1:] == keys[:-1])
        while len(at):
            a, b = order[at], order[at + offset]
            is_near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            if is_near.any():
                yield a[is_near], b[is_near]
            offset += 1
            at = at[at + offset < len(keys)]
            at = at[keys[at] == keys[at + offset]]


def check_distance(distance: int) -> None:
    """Raises `UserError` for a distance at which hashes cannot be compared."""
    if not 0 <= distance <= MOST_DISTANCE:
        raise UserError(
            f"near_distance is {distance}; give the most bits in which near duplicates differ, 0 to {MOST_DISTANCE}",
            "invalid_setting",
        )


def _blocks(number: int) -> list[int]:
    """Masks of `number` blocks of neighbouring bits, 64 in all."""
    ends = [_BITS * n // number for n in range(number + 1)]
    return [(1 << end) - (1 << start) for start, end in zip(ends, ends[1:], strict=False)]


def _agreeing(number: int, distance: int) -> int:
    """The blocks that should agree: with more of them there are more sorts, with fewer more pairs to compare."""

    def work(agreeing: int) -> float:
        blocks = distance + agreeing
        pairs = number / 2 ** (_BITS * agreeing // blocks)
        return math.comb(blocks, agreeing) * (math.log2(number + 2) + _COMPARISONS_PER_SORT_STEP * pairs)

    return min(range(1, _MOST_AGREEING + 1), key=work)


def _join_equal(parent: np.ndarray, values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins images with equal values; returns the distinct values and the first image of each."""
    order = np.flatnonzero(known)
    order = order[np.argsort(values[order], kind="stable")]
    ordered = values[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first, later = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    _join(parent, order[later], order[first[np.searchsorted(first, later) - 1]])
    return ordered[first], order[first]


def _join(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Joins the groups of a[i] and b[i]. `parent` of each image is one of its group with a lower number, or itself for
    the first of a group."""
    while len(a):
        a, b = _roots(parent, a), _roots(parent, b)
        is_apart = a != b
        a, b = a[is_apart], b[is_apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))


def _roots(parent: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The first image of each one's group; shortens the ways to it."""
    while True:
        up = parent[parent[images]]
        if (up == parent[images]).all():
            return up
        parent[images] = up
