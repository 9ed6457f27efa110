import json

import pyarrow.parquet as pq
import pytest
from support.label_fakes import FakeListing

from lumen_ray.data.files import write_atomically
from lumen_ray.errors import UserError
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger, open_finished

ITEMS = [Item(f"i{n}", f"/i{n}.png") for n in range(7)]


def record(item):
    return {**dict.fromkeys(LABEL_SCHEMA.names), "image_id": item.image_id, "task": "caption", "text": "x"}


def publish(ledger, fragment, *errors):
    ledger.publish(fragment.index, len(fragment.items), [record(item) for item in fragment.items], list(errors))


def test_a_label_file_without_an_entry_does_not_count(tmp_path):
    ledger = Ledger(tmp_path)
    fragment = next(ledger.plan(2).fragments(FakeListing(ITEMS[:2])))
    publish(ledger, fragment)
    assert ledger.done() == {0} and ledger.entry(0)["instances"] == {} and ledger.entry(1) is None
    (tmp_path / "ledger" / "000000.json").unlink()  # as if killed between the two renames
    assert list(ledger.tables()) == [] and ledger.done() == set()
    error = {"image_id": "i1", "path": "", "reason": "r", "message": "m"}
    ledger.publish(0, 2, [record(fragment.items[0])], [error])
    assert [t.num_rows for t in ledger.tables()] == [1] and list(ledger.items()) == ITEMS[:2]
    totals = ledger.totals()
    assert (totals["images"], totals["labelled"], totals["errors"]) == (2, 1, 1) and totals["first_error"] == error


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    error = {"image_id": "i1", "path": "", "reason": "r", "message": "m"}
    ledger.publish(0, 2, [record(ITEMS[0])], [error])
    reader = Ledger(tmp_path)
    entry = reader.entry

    def read_then_replaced(fragment):
        before = entry(fragment)
        if "round" not in before:
            Ledger(tmp_path, round=1).publish(0, 1, [record(ITEMS[1])], [], ["i0", "i1"])
        return before

    monkeypatch.setattr(reader, "entry", read_then_replaced)
    assert reader.table(0)["image_id"].to_pylist() == ["i0", "i1"]
    (tmp_path / "labels" / "part-000000-1.parquet").unlink()
    with pytest.raises(UserError, match="part-000000-1.parquet' does not exist"):
        reader.table(0)


def test_other_settings_are_refused_in_one_sentence(tmp_path):
    Ledger(tmp_path).open({"tasks": ["mistaken"]})  # nothing was labelled yet
    ledger = Ledger(tmp_path)
    ledger.open({"tasks": ["detect"], "score_threshold": 0.3})
    publish(ledger, next(ledger.plan(2).fragments(FakeListing(ITEMS[:1]))))
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


def test_long_settings_are_cut_to_what_differs(tmp_path):
    names = [f"class {n}" for n in range(40)]
    ledger = Ledger(tmp_path)
    ledger.open({"classes": names})
    publish(ledger, next(ledger.plan(2).fragments(FakeListing(ITEMS[:1]))))
    with pytest.raises(UserError, match=r'was \.\.\..*"class 30", .*, now \.\.\..*"another", "class 31"'):
        Ledger(tmp_path).open({"classes": [*names[:30], "another", *names[31:]]})


def test_the_labels_lie_in_any_store():
    ledger = Ledger("memory://ledger-test/out")
    ledger.open({"tasks": ["detect"]})
    fragments = list(ledger.plan(2).fragments(FakeListing(ITEMS)))
    for fragment in fragments[:2]:
        publish(ledger, fragment)
    again = Ledger("memory://ledger-test/out")
    assert again.done() == {0, 1} and list(again.items()) == ITEMS[:4] and len(list(again.tables())) == 2
    assert again.plan().num_images() == 7 and again.totals()["images"] == 4


def test_reading_what_is_no_output(tmp_path):
    with pytest.raises(UserError, match="not an output folder"):
        open_finished(tmp_path)


def test_a_table_from_before_a_column_was_introduced_has_nulls_there(tmp_path):
    ledger = Ledger(tmp_path)
    publish(ledger, next(ledger.plan(2).fragments(FakeListing(ITEMS[:2]))))
    part = tmp_path / "labels" / "part-000000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["sha256", "labelled_at"]), part)
    table = ledger.table(0)
    assert {f.name: f.type for f in table.schema} == {f.name: f.type for f in LABEL_SCHEMA}
    assert table["sha256"].null_count == 2 and table["text"].to_pylist() == ["x", "x"]
