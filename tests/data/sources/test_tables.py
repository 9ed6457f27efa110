"""Chunks of tables: every record once, in order, with any line breaks, and damage reported per record."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumen_ray.data.sources import tables
from lumen_ray.errors import UserError

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


def read(path, has_header=True, size=tables.CHUNK_RECORDS):
    found = tables.chunks(str(path), has_header, size)
    values = [pair for chunk in found for pair in tables.read_chunk(chunk)]
    assert [sum(1 for _ in tables.read_chunk(chunk)) for chunk in found] == [chunk["records"] for chunk in found]
    assert [origin for origin, _ in values] == [f"{path.name} record {n}" for n in range(len(values))]
    return [value for _, value in values]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=12), size=st.integers(1, 5), bom=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_cells_may_hold_line_breaks_and_quotes(tmp_path, suffix, rows, size, bom):
    text = io.StringIO()
    csv.writer(text, delimiter=tables.DELIMITERS[suffix]).writerows([["image", "text"], *rows])
    path = tmp_path / f"t{suffix}"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
    assert read(path, size=size) == [{"image": a, "text": b} for a, b in rows]
    without = read(path, has_header=False, size=size)
    assert without == [{"0": a, "1": b} for a, b in [["image", "text"], *rows]]


@given(
    values=st.lists(st.dictionaries(CELLS, CELLS, max_size=2), max_size=9), size=st.integers(1, 4), end=st.booleans()
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_of_json(tmp_path, values, size, end):
    path = tmp_path / "t.jsonl"
    path.write_text("\n\n".join(map(json.dumps, values)) + "\n" * end)
    assert read(path, size=size) == values


def test_parquet_by_row_group(tmp_path):
    rows = [{"image": {"bytes": bytes([n]), "path": None}, "text": str(n)} for n in range(10)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    assert [c["records"] for c in tables.chunks(str(path))] == [4, 4, 2]
    assert read(path) == rows
    assert tables.column_names(tables.chunks(str(path))[0]) == ["image", "text"]


def test_a_damaged_row_group_alone_is_lost(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"{n:08d}" * 50 for n in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(bytes(data))
    values = read(path)
    assert len(values) == 30
    assert [isinstance(v, UserError) for v in values] == [False] * 10 + [True] * 10 + [False] * 10


def test_a_bad_line_alone_is_lost(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,2\n3\n\n4,5,6\n\xff,7\n" + b"x" * 200_000 + b",8\n9,10\n")
    values = read(tmp_path / "t.csv", size=2)
    assert [str(v) for v in values if isinstance(v, UserError)] == [
        "it has 1 columns, the first line names 2",
        "it has 3 columns, the first line names 2",
        "the line cannot be read as csv: field larger than field limit (131072)",
    ]
    assert {"a": "\udcff", "b": "7"} in values  # no text, which the check of texts finds
    assert [v for v in values if isinstance(v, dict)][-1] == {"a": "9", "b": "10"}
    (tmp_path / "t.jsonl").write_bytes(b'{"a": 1}\n{"a"\n\xff\n{"a": 2}')
    values = read(tmp_path / "t.jsonl", size=2)
    assert [v if isinstance(v, dict) else None for v in values] == [{"a": 1}, None, None, {"a": 2}]


def test_files_that_cannot_work_are_refused(tmp_path):
    for name, content, message in (
        ("t.txt", b"", "not a known kind of table"),
        ("t.csv", b"", "it needs a line of column names"),
        ("t.parquet", b"PAR1", "not a readable parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            tables.chunks(str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        tables.chunks(str(tmp_path / "absent.csv"))
    with pytest.raises(UserError, match="no column pic for the image; give --image-column, columns: a, b"):
        tables.pick_column(["a", "b"], "pic", ("image",), "image")
    with pytest.raises(UserError, match="no column of the usual names"):
        tables.pick_column(["a", "b"], None, ("image",), "image")
    assert tables.pick_column(["a", "b"], None, ("x", "b"), "image") == "b"
