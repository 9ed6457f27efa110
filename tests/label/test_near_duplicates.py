"""Groups of near duplicates, beside a comparison of all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen_ray.errors import UserError
from lumen_ray.label.near_duplicates import check_distance, find_groups, near_pairs


@st.composite
def some_hashes(draw):
    """Hashes of which many are a few bits from each other."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bases = rng.integers(0, 2**64, draw(st.integers(1, 4)), np.uint64)
    hashes = []
    for _ in range(draw(st.integers(0, 40))):
        flips = rng.choice(64, rng.integers(0, 9), replace=False)
        hashes.append(int(rng.choice(bases)) ^ sum(1 << int(bit) for bit in flips))
    return np.array(hashes, np.uint64)


def brute_force(contents, has_content, hashes, has_hash, distance):
    """The first image of each one's group."""
    n = len(contents)
    near = np.eye(n, dtype=bool)
    near |= (contents[:, None] == contents) & has_content[:, None] & has_content
    near |= (np.bitwise_count(hashes[:, None] ^ hashes) <= distance) & has_hash[:, None] & has_hash
    for _ in range(n):
        near = near @ near
    return near.argmax(1) if n else np.zeros(0, int)


@settings(deadline=None, max_examples=150)
@given(some_hashes(), st.integers(0, 8), st.integers(1, 4))
def test_all_near_pairs_are_found(hashes, distance, agreeing):
    hashes = np.unique(hashes)
    pairs = [np.stack(pair, 1) for pair in near_pairs(hashes, distance, agreeing)]
    found = {frozenset(pair) for some in pairs for pair in some.tolist()}
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = {frozenset(pair) for pair in np.argwhere(np.triu(apart <= distance, 1)).tolist()}
    assert found == expected


@settings(deadline=None, max_examples=150)
@given(some_hashes(), st.integers(0, 8), st.randoms(use_true_random=False))
def test_groups_are_those_of_all_pairs(hashes, distance, random):
    n = len(hashes)
    contents = np.array([random.randrange(max(1, n)) for _ in range(n)], np.uint64)
    has_content = np.array([random.random() < 0.7 for _ in range(n)], bool)
    has_hash = np.array([random.random() < 0.8 for _ in range(n)], bool)
    groups = find_groups(contents, has_content, hashes, has_hash, distance)
    expected = brute_force(contents, has_content, hashes, has_hash, distance)
    assert groups.first.tolist() == expected.tolist()
    seen = set()
    for i in range(n):
        assert groups.is_exact[i] == (has_content[i] and contents[i] in seen)
        seen |= {contents[i]} if has_content[i] else set()
    sizes = np.bincount(expected, minlength=n)
    assert groups.counts["groups"] == (sizes > 1).sum()
    assert groups.counts["exact"] + groups.counts["near"] == (expected != np.arange(n)).sum()
    assert groups.is_member.tolist() == (sizes[expected] > 1).tolist()


def test_a_long_chain_is_one_group():
    """As the frames of a video, each near the next one only."""
    hashes = np.array([(2**64 - 1) ^ ((1 << n % 65) - 1) for n in range(65)], np.uint64)
    known = np.ones(65, bool)
    groups = find_groups(np.arange(65, dtype=np.uint64), known, hashes, known, 1)
    assert (groups.first == 0).all() and groups.counts == {"groups": 1, "exact": 0, "near": 64}


@pytest.mark.parametrize("distance", [-1, 17])
def test_a_distance_that_is_none(distance):
    with pytest.raises(UserError, match="near_distance is .*0 to 16"):
        check_distance(distance)
