"""COCO panoptic to rows: masks equal to the PNG's pixels, stuff and things, and what is refused."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
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


def small_set(encode, ids, **changes):
    data = {
        "images": [{"id": 0, "file_name": "0.jpg", "height": str(HEIGHT), "width": WIDTH}],
        "annotations": [{"image_id": "0", "file_name": "0.PNG", "segments_info": [
            {"id": int(i), "category_id": "1", "iscrowd": "0"} for i in np.unique(ids) if i]}],
        "categories": [{"id": 1, "name": "cow", "isthing": "1"}],
    } | changes  # fmt: skip
    return {"panoptic.json": json.dumps(data), "images/0.jpg": jpeg(), "segments/0.png": encode(ids)}


def saved(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def palette(ids):
    """Colours of the ids in a palette that numbers them otherwise."""
    values = np.unique(ids)
    image = Image.fromarray(np.searchsorted(values, ids).astype(np.uint8), "P")
    image.putpalette([c for i in values for c in (int(i) % 256, int(i) // 256 % 256, int(i) // 65536)])
    return saved(image)


def indexed(ids):
    """Ids as indices of a palette of random colours."""
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tolist())
    return saved(image)


def rgba(ids):
    channels = [ids % 256, ids // 256 % 256, ids // 65536, np.full_like(ids, 100)]
    return saved(Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGBA"))


@pytest.mark.parametrize(
    ("encode", "most"),
    [
        (id_png, 2**24 - 1),
        (rgba, 2**24 - 1),
        (palette, 2**24 - 1),
        (lambda ids: saved(Image.fromarray(ids.astype(np.uint8), "L")), 255),
        (lambda ids: saved(Image.fromarray(ids.astype(np.uint16))), 65535),
        (indexed, 255),
        (lambda ids: saved(Image.fromarray(ids.astype(bool))), 1),
    ],
    ids=["RGB", "RGBA", "palette of colours", "L", "I;16", "palette of indices", "1"],
)
def test_ids_are_the_stored_values(tmp_path, encode, most):
    ids = np.random.default_rng(most).choice([0, most, max(most // 3, 1)], (HEIGHT, WIDTH))
    rows, rejected, _ = prepared(source(write(tmp_path, small_set(encode, ids))), tmp_path / "out")
    assert rejected == []
    masks = Masks([i["mask"] for i in rows["0.jpg"]["instances"]], (HEIGHT, WIDTH)).to_arrays()
    assert (masks == np.stack([ids == i for i in np.unique(ids) if i])).all()


def test_an_object_of_unknown_class_leaves_no_class(tmp_path):
    contents = panoptic_set()
    data = json.loads(contents["panoptic.json"])
    data["annotations"][0]["segments_info"][2]["category_id"] = 9
    rows, _, _ = prepared(source(write(tmp_path, contents | {"panoptic.json": json.dumps(data)})), tmp_path / "out")
    assert (rows["0.jpg"]["classes"], rows["1.jpg"]["classes"]) == ([], ["sky", "cow"])
    for segment in (s for a in data["annotations"] for s in a["segments_info"]):
        segment["category_id"] = 9
    write(tmp_path, {"panoptic.json": json.dumps(data)})
    with pytest.raises(UserError, match="6 of 6 segments in .* name an image or a category that it does not list"):
        source(tmp_path).read_listing()


def test_a_png_of_another_image_and_a_second_id_are_rejected(tmp_path):
    contents = panoptic_set()
    data = json.loads(contents["panoptic.json"])
    data["annotations"][1]["file_name"] = "0.png"
    data["images"].append({"id": 5, "file_name": "./0.jpg"})
    data["categories"].append({"id": 3, "name": "animals", "isthing": 1})
    data["categories"][1]["supercategory"] = "animals"
    write(tmp_path, contents | {"panoptic.json": json.dumps(data)})
    rows, rejected, counts = prepared(source(tmp_path), tmp_path / "out")
    assert list(rows) == ["0.jpg"] and rows["0.jpg"]["classes"] == ["sky", "cow"]
    assert counts["images"] == {"in": 3, "written": 1, "rejected": 2}
    assert sum("its PNG file '0.png' is that of the image '0.jpg'" in r["reason"] for r in rejected) == 3
    assert "left out as no class: 'animals'" in source(tmp_path).read_listing().notes[0]


def test_a_segment_that_the_json_does_not_list_could_be_of_any_class(tmp_path):
    contents = panoptic_set()
    data = json.loads(contents["panoptic.json"])
    del data["annotations"][0]["segments_info"][1]
    write(tmp_path, contents | {"panoptic.json": json.dumps(data)})
    rows, rejected, _ = prepared(source(tmp_path), tmp_path / "out")
    assert rejected == [] and (rows["0.jpg"]["classes"], rows["1.jpg"]["classes"]) == ([], ["sky", "cow"])
    changed = shards.read_manifest(tmp_path / "out")["changed"]
    assert changed == {"segments of the PNG that the json does not list": 1}


def test_segments_of_one_id_are_rejected(tmp_path):
    contents = panoptic_set()
    data = json.loads(contents["panoptic.json"])
    data["annotations"][0]["segments_info"][1]["id"] = "7"
    write(tmp_path, contents | {"panoptic.json": json.dumps(data)})
    rows, rejected, _ = prepared(source(tmp_path), tmp_path / "out")
    assert [r["rule"] for r in rejected] == ["repeated_id"] * 2 and rows["0.jpg"]["classes"] == []


def test_a_palette_of_which_both_readings_fit_is_decided_by_the_areas(tmp_path):
    ids = np.ones((HEIGHT, WIDTH), int)
    ids[5:15, 5:15] = 2
    image = Image.fromarray((3 - ids).astype(np.uint8), "P")  # indices are the other way round
    image.putpalette([0, 0, 0, 2, 0, 0, 1, 0, 0])
    contents = small_set(lambda _: saved(image), ids)
    with pytest.raises(UserError, match="whose indices and whose colours could both be the ids"):
        prepared(source(write(tmp_path, contents)), tmp_path / "out")
    data = json.loads(contents["panoptic.json"])
    for segment in data["annotations"][0]["segments_info"]:
        segment["area"] = int((ids == segment["id"]).sum())
    rows, _, _ = prepared(source(write(tmp_path, contents | {"panoptic.json": json.dumps(data)})), tmp_path / "out")
    masks = Masks([i["mask"] for i in rows["0.jpg"]["instances"]], (HEIGHT, WIDTH)).to_arrays()
    assert (masks == np.stack([ids == 1, ids == 2])).all()


def test_skipped_segments_tell_how_a_palette_is_read(tmp_path):
    ids = np.zeros((HEIGHT, WIDTH), int)
    ids[5:15, 5:15] = 1
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 9, 9, 9])
    contents = small_set(lambda _: saved(image), ids)
    data = json.loads(contents["panoptic.json"])
    for category in data["categories"]:
        category["isthing"] = 0
    data["annotations"][0]["segments_info"] = data["annotations"][0]["segments_info"][:1]
    path = write(tmp_path, contents | {"panoptic.json": json.dumps(data)})
    rows, rejected, _ = prepared(source(path, stuff="skip"), tmp_path / "out")
    assert list(rows) == ["0.jpg"] and rejected == []


def test_the_png_of_a_rejected_annotation_is_no_other_images(tmp_path):
    """`segments/0001.png` is that of cam1 or of cam2."""
    contents = small_set(lambda ids: saved(Image.fromarray(ids.astype(np.uint8))), np.ones((HEIGHT, WIDTH), int))
    data = json.loads(contents["panoptic.json"])
    first = data["annotations"][0] | {"file_name": "cam1/0001.png"}
    segments = first["segments_info"] * 2  # most segments are of images that are listed
    data["annotations"] = [first | {"segments_info": [s | {"id": n} for n, s in enumerate(segments, 1)]},
                           {"image_id": 77, "file_name": "cam2/0001.png", "segments_info": segments[:1]}]  # fmt: skip
    contents = {
        "images/0.jpg": jpeg(),
        "panoptic.json": json.dumps(data),
        "segments/0001.png": contents["segments/0.png"],
    }
    with pytest.raises(UserError, match="other listed images have the same file name"):
        prepared(source(write(tmp_path, contents)), tmp_path / "out")
