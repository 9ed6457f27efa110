"""Columns of the label table that may be null throughout: in exports if any row has a value."""

import csv
import io
import json
import tarfile
from datetime import UTC, datetime

import pyarrow.json
import pytest
from support import export_labels as made

from lumen_ray import export_labels

TIME = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("columns")

    def rows(image_id, path, size):
        found = made.records(image_id, path, size)
        for row in found:
            row |= {"sha256": image_id * 2, "labelled_at": TIME}
            if image_id.startswith("B/"):
                row["duplicate_of"] = "b/x y.png"
            if row["task"] == "detect" and row["phrase"] == made.CLASSES[0] and not image_id.startswith("B/"):
                row["verified"] = 0.5
        return found

    folder = made.write_labels(root / "labels", photos=made.write_photos(root / "photos"), rows=rows)
    export_labels(folder, ["csv", "imagefolder", "webdataset"])
    return folder


def test_csv(folder):
    table = list(csv.DictReader((folder / "csv" / "labels.csv").open(encoding="utf-8")))
    assert list(table[0])[-5:] == ["text", "verified", "sha256", "duplicate_of", "labelled_at"]
    for row in table:
        assert row["sha256"] == row["image_id"] * 2 and datetime.fromisoformat(row["labelled_at"]) == TIME
        assert row["duplicate_of"] == ("b/x y.png" if row["image_id"].startswith("B/") else "")
        is_asked = row["task"] == "detect" and row["phrase"] == made.CLASSES[0] and not row["duplicate_of"]
        assert row["verified"] == ("0.5" if is_asked else "")


def check(sample):
    assert sample["sha256"] == sample["image_id"] * 2 and datetime.fromisoformat(sample["labelled_at"]) == TIME
    assert sample["duplicate_of"] == ("b/x y.png" if sample["image_id"].startswith("B/") else None)
    found = [] if sample["image_id"].startswith("nothing") else [-1, -1]
    assert sample["detect"]["verified"] == ([0.5, -1] if found and not sample["image_id"].startswith("B/") else found)
    assert "presence" not in sample["detect"] and "verified" not in sample["segment"]


def test_json_of_samples(folder):
    lines = [json.loads(line) for line in (folder / "imagefolder" / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        check(line)
    # the first lines have every type: the first image's, and the first one that is a duplicate
    assert [line["image_id"] for line in lines] == [
        *("a/x y.png", "B/X Y.png", "b/x y.png", "b/frame.001.jpg", "nothing-ü.jpg"),
    ]
    with tarfile.open(folder / "webdataset" / "labels-00001.tar") as tar:
        samples = [json.load(io.TextIOWrapper(tar.extractfile(m))) for m in tar if m.name.endswith(".json")]
    assert len(samples) == 5
    for sample in samples:
        check(sample)


def test_columns_without_a_value_are_left_out(tmp_path):
    photos = made.write_photos(tmp_path / "photos")
    folder = made.write_labels(tmp_path / "labels", photos=photos, rows=made.records_without_hashes)
    export_labels(folder, ["csv", "imagefolder"])
    head = (folder / "csv" / "labels.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head.endswith(",keypoints,text")
    line = json.loads((folder / "imagefolder" / "metadata.jsonl").read_text().splitlines()[0])
    assert list(line) == ["file_name", "image_id", "height", "width", *made.SETTINGS["tasks"]]


def test_datasets_reads_them(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = str(folder / "imagefolder")
    table = datasets.load_dataset("imagefolder", data_dir=data, split="train", cache_dir=str(tmp_path))
    assert len(table) == 5
    for row in table:
        check(row)


def test_pyarrow_reads_what_was_written(folder):
    """It moves values of lists that have nulls into other rows."""
    path = folder / "imagefolder" / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    read = pyarrow.json.read_json(path).to_pylist()
    assert [row["detect"]["verified"] for row in read] == [line["detect"]["verified"] for line in lines]
