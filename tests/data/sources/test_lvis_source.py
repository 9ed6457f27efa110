"""LVIS json: no file names, and only some classes are looked for in an image."""

import json

import numpy as np
import pytest

from lumen_ray.data.scenes.render import encode_jpeg
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.shards import read_manifest, read_rows
from lumen_ray.data.sources.coco import CocoSource

NAMES = [f"thing {i}" for i in range(1200)]
URL = "http://images.cocodataset.org/{}/{:012d}.jpg"


def image(key, folder, neg, partial=()):
    return {
        "id": key, "coco_url": URL.format(folder, key), "height": 40, "width": 60,
        "neg_category_ids": list(neg), "not_exhaustive_category_ids": list(partial),
    }  # fmt: skip


def annotation(key, image_id, category):
    return {"id": key, "image_id": image_id, "category_id": category, "bbox": [key % 40, 2, 10, 12], "area": 120,
            "segmentation": [[1, 2, 11, 2, 11, 14, 1, 14]]}  # fmt: skip


@pytest.fixture
def lvis(tmp_path):
    """Image 1: things 1 and 2, of which 2 not all, 5 and 6 absent; image 2: nothing but absent ones; 3: thing 9."""
    for key, folder in ((1, "train2017"), (2, "val2017"), (3, "val2017")):
        path = tmp_path / "images" / folder / f"{key:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(np.full((40, 60, 3), 40 * key, np.uint8)))
    data = {
        "images": [image(1, "train2017", [5, 6], [2]), image(2, "val2017", [7]), image(3, "val2017", [])],
        "annotations": [annotation(1, 1, 1), annotation(2, 1, 2), annotation(3, 1, 1), annotation(4, 3, 9)],
        "categories": [
            {"id": i, "name": name, "synset": f"{i}.n.01", "frequency": "r", "image_count": 1}
            for i, name in enumerate(NAMES)
        ],
    }
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    return tmp_path


def test_a_row_lists_the_exhaustively_annotated_classes(lvis):
    source = CocoSource([str(lvis / "lvis.json")], str(lvis / "images"))
    summary = prepare_source(lvis / "out", source, workers=0)
    assert (summary["rows"], summary["rejected"]) == (3, 0)
    rows = {row["image_id"]: row for row in read_rows(lvis / "out")}
    classes = {int(name.split(".")[0]): {int(c.split()[1]) for c in row["classes"]} for name, row in rows.items()}
    assert classes == {1: {1, 5, 6}, 2: {7}, 3: {9}}
    assert [i["phrase"] for i in rows["000000000001.jpg"]["instances"]] == ["thing 1", "thing 2", "thing 1"]
    manifest = read_manifest(lvis / "out")
    counted = {c["name"]: c["images"] for c in manifest["categories"] if c["images"]}
    assert counted == {"thing 1": 1, "thing 2": 1, "thing 9": 1}
    assert len(manifest["categories"]) == len(NAMES)


def test_images_are_found_in_one_flat_folder_too(lvis):
    for path in list((lvis / "images").glob("*/*.jpg")):
        path.rename(lvis / "images" / path.name)
    summary = prepare_source(lvis / "out", CocoSource([str(lvis / "lvis.json")], str(lvis / "images")), workers=0)
    assert (summary["rows"], summary["rejected"]) == (3, 0)


def test_a_long_list_in_every_row_costs_little(tmp_path):
    """A set annotated for all of 1,200 classes repeats 12 KB of names in each row; what is stored must not show it."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in range(64)]
    pictures = tmp_path / "images"
    pictures.mkdir()
    for entry in images:
        (pictures / entry["file_name"]).write_bytes(encode_jpeg(np.full((40, 60, 3), entry["id"], np.uint8)))
    sizes = {}
    for number in (3, len(NAMES)):
        data = {
            "images": images,
            "annotations": [annotation(i, i, i % 3) for i in range(64)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES[:number])],
        }
        (tmp_path / "a.json").write_text(json.dumps(data))
        out = tmp_path / f"out{number}"
        source = CocoSource([str(tmp_path / "a.json")], str(pictures))
        summary = prepare_source(out, source, rows_per_group=8, workers=0)
        sizes[number] = sum(file["bytes"] for file in read_manifest(out)["files"]) / summary["rows"]
        assert {len(row["classes"]) for row in read_rows(out)} == {number}
    assert sizes[len(NAMES)] - sizes[3] < 1000


def test_captions_of_the_same_images_change_no_class(lvis):
    """Image 3 has no absent class: it must still count as one of which only some classes were looked for."""
    captions = {
        "images": [{"id": 3, "file_name": f"{3:012d}.jpg", "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 3, "caption": "a thing"}],
    }
    (lvis / "captions.json").write_text(json.dumps(captions))
    paths = [str(lvis / name) for name in ("captions.json", "lvis.json")]
    prepare_source(lvis / "out", CocoSource(paths, str(lvis / "images")), workers=0)
    row = next(row for row in read_rows(lvis / "out") if row["image_id"].endswith("3.jpg"))
    assert (row["classes"], len(row["messages"])) == (["thing 9"], 1)
