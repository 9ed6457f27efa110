"""COCO panoptic to rows: masks equal to the PNG's pixels, stuff and things, and what is refused."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.source_fakes import HEIGHT, WIDTH, id_png, jpeg, panoptic_set, prepared, write

from lumen_ray.data.shards import shards
from lumen_ray.data.sources.panoptic import PanopticSource
from lumen_ray.errors import UserError
from lumen_ray.structures import Masks


def source(folder, **options):
    return PanopticSource(f"{folder}/panoptic.json", f"{folder}/segments", f"{folder}/images", **options)


def test_things_stuff_and_crowd(tmp_path):
    rows, rejected, counts = prepared(source(write(tmp_path, panoptic_set())), tmp_path / "out")
    assert rejected == []
    assert counts["annotations"] == {"in": 6, "written": 6, "rejected": 0}
    row = rows["0.jpg"]
    assert [(i["phrase"], i["box"], i["crowd"], i["area"]) for i in row["instances"]] == [
        ("sky", [0, 0, 60, 10], False, 600),
        ("cow", [0, 10, 30, 20], False, 300),
        ("cow", [30, 20, 60, 30], True, 300),
    ]
    assert row["classes"] == ["sky", "cow"]
    assert row["tasks"] == ["detect", "count", "segment"]
    categories = shards.read_manifest(tmp_path / "out")["categories"]
    assert [(c["name"], c["stuff"]) for c in categories] == [("sky", True), ("cow", False)]


def test_stuff_can_be_skipped(tmp_path):
    rows, rejected, counts = prepared(source(write(tmp_path, panoptic_set()), stuff="skip"), tmp_path / "out")
    assert rejected == []
    assert counts["annotations"] == {"in": 4, "written": 4, "rejected": 0}
    assert {i["phrase"] for i in rows["0.jpg"]["instances"]} == {"cow"}
    assert rows["0.jpg"]["classes"] == ["cow"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 2**24 - 1), min_size=1, max_size=6, unique=True))
def test_masks_are_the_pixels_of_the_png(seed, ids):
    picture = np.random.default_rng(seed).choice([0, *ids], (HEIGHT, WIDTH))
    segments = [{"id": i, "category_id": 1} for i in ids]
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "thing", "isthing": 1}],
    }
    contents = {"panoptic.json": json.dumps(data), "images/a.jpg": jpeg(), "segments/a.png": id_png(picture)}
    with tempfile.TemporaryDirectory() as folder:
        rows, rejected, _ = prepared(source(write(Path(folder), contents)), f"{folder}/out")
    assert rejected == []
    masks = Masks([i["mask"] for i in rows["a.jpg"]["instances"]], (HEIGHT, WIDTH)).to_arrays()
    assert (masks == np.stack([picture == i for i in ids])).all()


@pytest.mark.parametrize(
    ("change", "reason", "kinds"),
    [
        (lambda d: d["annotations"][0]["segments_info"][1].update(id=9), "not in the PNG", ["annotations"]),
        (lambda d: d["annotations"][0]["segments_info"][1].update(category_id=9), "unknown category", ["annotations"]),
        (lambda d: d["annotations"][0]["segments_info"][1].update(id=0), "positive number", ["annotations"]),
        (lambda d: d["annotations"][0].update(file_name="no.png"), "is missing", ["images"] + ["annotations"] * 3),
        (lambda d: d["annotations"][0].update(image_id=77), "not in the file", ["annotations"] * 3 + ["images"]),
        (lambda d: d["annotations"][0].update(image_id=1), "already", ["annotations"] * 3 + ["images"] * 1),
        (lambda d: d["images"][0].update(width=61), "size mismatch", ["images"] + ["annotations"] * 3),
    ],
)
def test_bad_segments_are_rejected(tmp_path, change, reason, kinds):
    contents = panoptic_set()
    data = json.loads(contents["panoptic.json"])
    change(data)
    _, rejected, _ = prepared(source(write(tmp_path, contents | {"panoptic.json": json.dumps(data)})), tmp_path / "out")
    assert sorted(r["kind"] for r in rejected) == sorted(kinds)
    assert any(reason in r["reason"] for r in rejected)


def test_a_second_annotation_is_rejected_also_where_the_first_names_no_png(tmp_path):
    contents = panoptic_set()
    data = json.loads(contents["panoptic.json"])
    data["annotations"].append(dict(data["annotations"][0]))
    del data["annotations"][0]["file_name"]
    contents["panoptic.json"] = json.dumps(data)
    rows, rejected, counts = prepared(source(write(tmp_path, contents)), tmp_path / "out")
    assert list(rows) == ["1.jpg"]
    assert counts["annotations"] == {"in": 9, "written": 3, "rejected": 6}
    reasons = [r["reason"] for r in rejected]
    assert reasons.count("its image has an annotation already") == 3
    assert reasons.count("its image was rejected: no panoptic annotation names its PNG file") == 3


def test_a_file_that_is_not_panoptic_is_refused(tmp_path):
    write(tmp_path, panoptic_set())
    for data, message in (
        ({"images": [], "annotations": []}, "no list 'categories'"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}, "image 0 needs"),
        ({"images": [], "annotations": [], "categories": [{"id": 1}]}, "a category needs"),
    ):
        (tmp_path / "panoptic.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match=message):
            source(tmp_path).read_listing()
    with pytest.raises(UserError, match="unknown stuff rule 'drop'"):
        source(tmp_path, stuff="drop")
