import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.label_fakes import FakeListing

from lumen_ray.data.hash_set import HashSet
from lumen_ray.label.inputs import Item
from lumen_ray.label.plan import FIRST_FRAGMENTS, Plan, read_fragments, reference

ITEMS = [Item(f"i{n}", f"/i{n}.png") for n in range(7)]


def ids(fragments):
    return [(f.index, [item.image_id for item in f.items]) for f in fragments]


def test_fragments_keep_their_images_when_the_input_grows(tmp_path):
    plan = Plan(str(tmp_path), 2)
    assert [len(f.items) for f in plan.fragments(FakeListing(ITEMS[:5], {".txt": 1}))] == [2, 2, 1]
    assert plan.is_complete and plan.num_images() == 5 and plan.left_out == {".txt": 1}
    grown = Plan(str(tmp_path), 2)
    assert ids(grown.fragments()) == [(0, ["i0", "i1"]), (1, ["i2", "i3"]), (2, ["i4"])]
    new = ids(grown.fragments(FakeListing([Item("a-new", "/a.png"), *ITEMS])))[3:]
    assert new == [(3, ["a-new", "i5"]), (4, ["i6"])] and grown.num_fragments() == 5


def test_images_of_one_name_get_numbers_and_keep_them(tmp_path):
    rows = [Item("a.jpg", "/s.parquet", 0, row) for row in range(3)]
    plan = Plan(str(tmp_path), 4)
    (first,) = plan.fragments(FakeListing([rows[0], rows[1], Item("a.jpg#2", "/x")]))
    assert [item.image_id for item in first.items] == ["a.jpg", "a.jpg#3", "a.jpg#2"]  # its own
    again = list(plan.fragments(FakeListing([rows[2], *rows[:2]])))
    assert [(i.image_id, i.row) for f in again[1:] for i in f.items] == [("a.jpg#4", 2)]


def test_a_plan_is_written_before_its_fragments_are_handed_out(tmp_path):
    """A job that is killed while it lists goes on with the same fragments, and its listing was not held whole."""
    listed = []

    def long_listing():
        for n in itertools.count():
            listed.append(n)
            yield Item(f"i{n}", f"/i{n}.png")

    plan = Plan(str(tmp_path), 4)
    before = ids(itertools.islice(plan.fragments(FakeListing(long_listing())), FIRST_FRAGMENTS + 1))
    assert len(listed) <= 2048 and not plan.is_complete
    again = Plan(str(tmp_path), 4)
    assert again.num_images() == 4 * 3 * FIRST_FRAGMENTS and ids(again.fragments())[: len(before)] == before
    some = FakeListing(Item(f"i{n}", f"/i{n}.png") for n in range(200))
    names = [name for _, found in ids(again.fragments(some)) for name in found]
    assert names == [f"i{n}" for n in range(200)] and again.is_complete


def test_a_reference_is_short_and_gives_its_fragments_back(tmp_path):
    """Of several files, with gaps, and from a file in several row groups."""
    plan = Plan(str(tmp_path), 400)
    made = list(plan.fragments(FakeListing(Item(f"i{n}", f"/{n}.png", record="x" * 50) for n in range(12_000))))
    for wanted in (made[:1], made[5:11], made[3:30:4], made[-1:]):
        found = reference(wanted)
        assert read_fragments(found) == wanted and len(found) < 400
    assert list(Plan(str(tmp_path)).fragments())[3] == made[3]


def test_a_plan_in_one_file_of_an_older_version_is_read(tmp_path):
    plan = Plan(str(tmp_path), 3)
    before = ids(plan.fragments(FakeListing(ITEMS)))
    (tmp_path / "inputs-00000.parquet").rename(tmp_path / "inputs.parquet")
    assert ids(Plan(str(tmp_path), 3).fragments(FakeListing([*ITEMS, Item("new", "/new")]))) == [*before, (3, ["new"])]


@given(st.lists(st.lists(st.integers(0, 60))))
def test_the_hash_set_is_a_set(blocks):
    mine, theirs = HashSet(), set()
    for block in blocks:
        known = []
        for value in block:
            known.append(value in theirs)
            theirs.add(value)
        assert mine.add(block) == known


def test_the_hash_set_takes_eight_bytes_a_value():
    hashes = HashSet()
    for start in range(0, 200_000, 1000):
        hashes.add(list(range(start, start + 1000)))
    assert sum(run.nbytes for run in hashes._runs) == 8 * 200_000 and len(hashes._runs) < 20


@pytest.mark.parametrize("number", [0, 1, 8, 9, 33])
def test_every_image_is_planned_once(tmp_path, number):
    items = [Item(f"i{n}", f"/i{n}.png") for n in range(number)]
    plan = Plan(str(tmp_path), 2)
    assert [i for f in plan.fragments(FakeListing(items)) for i in f.items] == items
    assert [i for f in plan.fragments() for i in f.items] == items
