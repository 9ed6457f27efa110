"""The index of content hashes, beside a dict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.label_fakes import FakeEngine, write_images

from lumen_ray.label.content_index import ContentIndex, KeyTable, content_keys
from lumen_ray.label.pipeline import label

KEYS = st.lists(st.integers(0, 40) | st.integers(2**64 - 40, 2**64 - 1), max_size=30)


@settings(deadline=None)
@given(st.lists(KEYS, max_size=12), KEYS)
def test_a_table_is_a_dict_that_keeps_first_values(blocks, asked):
    table, expected = KeyTable(), {}
    for value, block in enumerate(blocks):
        table.add(np.array(block, np.uint64), np.full(len(block), value, np.uint32))
        for key in block:
            expected.setdefault(key, value)
    assert table.find(np.array(asked, np.uint64)).tolist() == [expected.get(key, -1) for key in asked]


def test_a_table_takes_twelve_bytes_a_key():
    table = KeyTable()
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 100_000, np.uint64)
    for start in range(0, len(keys), 32):
        table.add(keys[start : start + 32], np.full(32, start // 32, np.uint32))
    assert (table.find(keys) == np.arange(len(keys)) // 32).all()
    runs = table._runs
    assert sum(part.nbytes for run in runs for part in run) == 12 * len(keys) and len(runs) < 20


def test_an_index_is_filled_from_what_is_published(tmp_path):
    photos = write_images(tmp_path / "in", 10)
    label(
        FakeEngine, photos, tmp_path / "out", tasks=["detect"], classes=["square"], num_actors=0, fragment_size=4,
        exports=(),
    )  # fmt: skip
    import hashlib

    digests = [hashlib.sha256((photos / f"image{i:03d}.png").read_bytes()).hexdigest() for i in range(10)]
    index = ContentIndex(str(tmp_path / "out"))
    assert index.find(content_keys([*digests, "00" * 32])).tolist() == [i // 4 for i in range(10)] + [-1]
    (tmp_path / "out" / "labels" / "part-000001.parquet").write_bytes(b"damaged")
    found = ContentIndex(str(tmp_path / "out")).find(content_keys(digests))
    assert found.tolist() == [0, 0, 0, 0, -1, -1, -1, -1, 2, 2]
    (tmp_path / "out" / "ledger" / "000002.json").unlink()  # not published
    assert ContentIndex(str(tmp_path / "out")).find(content_keys(digests[8:])).tolist() == [-1, -1]


@pytest.mark.parametrize("digest", ["00" * 32, "ff" * 32])
def test_keys_are_the_first_eight_bytes(digest):
    assert content_keys([digest]).tolist() == [int(digest[:16], 16)]
    assert content_keys([]).dtype == np.uint64
