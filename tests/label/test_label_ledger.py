import json

import pytest

from lumen_ray.data.files import write_atomically
from lumen_ray.errors import UserError
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger, open_finished

ITEMS = [Item(f"i{n}", f"/i{n}.png") for n in range(7)]


def record(item):
    return {**dict.fromkeys(LABEL_SCHEMA.names), "image_id": item.image_id, "task": "caption", "text": "x"}


def test_fragments_keep_their_images_when_the_input_grows(tmp_path):
    ledger = Ledger(tmp_path)
    fragments = ledger.plan(ITEMS[:5], 2)
    assert [len(f.items) for f in fragments] == [2, 2, 1]
    ledger.publish(fragments[1], [record(i) for i in fragments[1].items], [])
    again = Ledger(tmp_path).plan([Item("a-new", "/a.png"), *ITEMS], 2)
    assert [(f.index, [i.image_id for i in f.items]) for f in again] == [
        (0, ["i0", "i1"]),
        (2, ["i4"]),
        (3, ["a-new", "i5"]),
        (4, ["i6"]),
    ]


def test_images_of_one_name_get_numbers_and_keep_them(tmp_path):
    ledger = Ledger(tmp_path)
    (first,) = ledger.plan([Item("a.jpg", "/s.parquet", 0, 0), Item("a.jpg", "/s.parquet", 0, 1)], 4)
    assert [item.image_id for item in first.items] == ["a.jpg", "a.jpg#2"]
    ledger.publish(first, [record(item) for item in first.items], [])
    again = Ledger(tmp_path).plan(
        [Item("a.jpg", "/r.parquet", 0, 0), *[Item("a.jpg", *i.place) for i in first.items]], 4
    )
    assert [(i.image_id, i.path) for fragment in again for i in fragment.items] == [("a.jpg#3", "/r.parquet")]


def test_a_label_file_without_an_entry_does_not_count(tmp_path):
    ledger = Ledger(tmp_path)
    fragment = ledger.plan(ITEMS[:2], 2)[0]
    ledger.publish(fragment, [record(i) for i in fragment.items], [])
    (tmp_path / "ledger" / "000000.json").unlink()  # as if killed between the two renames
    assert list(ledger.tables()) == [] and ledger.plan(ITEMS[:2], 2) == [fragment]
    ledger.publish(
        fragment, [record(fragment.items[0])], [{"image_id": "i1", "path": "", "reason": "r", "message": "m"}]
    )
    assert [t.num_rows for t in ledger.tables()] == [1]
    assert ledger.entries()[0]["labelled"] == 1 and len(list(ledger.items())) == 2


def test_other_settings_are_refused_in_one_sentence(tmp_path):
    Ledger(tmp_path).open({"tasks": ["mistaken"]})  # nothing was labelled yet
    ledger = Ledger(tmp_path)
    ledger.open({"tasks": ["detect"], "score_threshold": 0.3})
    ledger.publish(ledger.plan(ITEMS[:1], 2)[0], [record(ITEMS[0])], [])
    ledger.open({"tasks": ["detect"], "score_threshold": 0.3})
    with pytest.raises(UserError, match=r"score_threshold was 0.3, now 0.5, and tasks") as caught:
        Ledger(tmp_path).open({"tasks": ["pose"], "score_threshold": 0.5})
    assert caught.value.reason == "other_settings"
    assert json.loads((tmp_path / "job.json").read_text())["score_threshold"] == 0.3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    write_atomically(path, lambda p: p.write_text("old"))

    def broken(p):
        p.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "old"


def test_reading_what_is_no_output(tmp_path):
    with pytest.raises(UserError, match="not an output folder"):
        open_finished(tmp_path)
