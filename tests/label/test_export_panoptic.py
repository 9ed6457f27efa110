"""COCO panoptic, read by the published format: ids of PNG files, overlaps, what JSON and PNG say of each other."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from support import export_labels as made
from support.label_fakes import FakeListing

from lumen_ray import export_labels, prepare
from lumen_ray.data.shards.shards import read_rows
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger
from lumen_ray.structures import Masks

IMAGES = (("a/one.png", (20, 30)), ("two.png", (12, 16)))
CLASSES = ("sky", "cat")


def masks(size):
    """Class, score and mask of four objects: the second is half under the first, the third wholly under both."""
    found = np.zeros((4, *size), bool)
    found[0, 2:8, 3:12] = True
    found[1, 5:11, 3:12] = True
    found[2, 6:8, 4:6] = True
    found[3, 0:2, 0:3] = True
    return list(zip(("cat", "cat", "sky", "sky"), (0.9, 0.8, 0.4, 0.5), found, strict=True))


def rows(image_id, path, size):
    base = dict.fromkeys(LABEL_SCHEMA.names) | {"image_id": image_id, "path": path, "provenance": ""}
    base |= {"height": size[0], "width": size[1]}
    if image_id == "two.png":
        return [base | {"task": "segment"}, base | {"task": "semantic"}]
    found = []
    for phrase, score, mask in masks(size):
        ys, xs = np.nonzero(mask)
        box = [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
        one = base | {"phrase": phrase, "score": score, "box": box, "mask": Masks.from_arrays(mask[None]).rles[0]}
        found.append(one | {"task": "segment"})
        if score != 0.8:
            found.append(one | {"task": "semantic"})
    return sorted(found, key=lambda row: row["task"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("panoptic")
    (root / "photos" / "a").mkdir(parents=True)
    for name, size in IMAGES:
        Image.fromarray(made.pixels(0, size)).save(root / "photos" / name)
    settings = {"tasks": ["segment", "semantic"], "classes": list(CLASSES)}
    labels = made.write_labels(root / "labels", photos=root / "photos", images=IMAGES, rows=rows, settings=settings)
    summary = export_labels(labels, ["coco-panoptic"])["coco-panoptic"]
    assert summary["tasks"] == ["segment", "semantic"] and summary["images"] == 2
    return root


def read_ids(path):
    """R + 256 G + 65536 B, int64 [H, W]."""
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image, np.int64) @ [1, 256, 65536]


@pytest.mark.parametrize("task", ["segment", "semantic"])
def test_files(folder, task):
    out = folder / "labels" / "coco-panoptic"
    data = json.loads((out / f"{task}.json").read_text())
    is_thing = int(task == "segment")
    assert [(c["id"], c["name"], c["isthing"]) for c in data["categories"]] == [
        (1, "sky", is_thing),
        (2, "cat", is_thing),
    ]
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in data["images"]] == [
        (n, name, *size) for n, (name, size) in enumerate(IMAGES, start=1)
    ]
    first, second = data["annotations"]
    assert (first["image_id"], first["file_name"]) == (1, "a_one.png")
    assert (second["image_id"], second["segments_info"]) == (2, [])
    assert sorted(path.name for path in (out / task).iterdir()) == ["a_one.png", "two.png"]
    assert not read_ids(out / task / "two.png").any()
    # what stays visible of each, by score; of the third nothing does
    wanted, covered = [], np.zeros(IMAGES[0][1], bool)
    for phrase, score, mask in sorted(masks(IMAGES[0][1]), key=lambda found: -found[1]):
        if task == "segment" or score != 0.8:
            wanted.append((phrase, score, mask & ~covered))
            covered |= mask
    wanted = [found for found in wanted if found[2].any()]
    assert [found[1] for found in wanted] == ([0.9, 0.8, 0.5] if is_thing else [0.9, 0.5])
    ids = read_ids(out / task / "a_one.png")
    assert set(np.unique(ids)) == {0, *(segment["id"] for segment in first["segments_info"])}
    for segment, (phrase, score, mask) in zip(first["segments_info"], wanted, strict=True):
        assert np.array_equal(ids == segment["id"], mask)
        ys, xs = np.nonzero(mask)
        assert segment["bbox"] == [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
        assert segment["area"] == mask.sum() and segment["iscrowd"] == 0
        assert segment["category_id"] == CLASSES.index(phrase) + 1 and segment["score"] == pytest.approx(score)
    cat = data["categories"][1]["color"]
    assert first["segments_info"][0]["id"] == cat[0] + 256 * cat[1] + 65536 * cat[2]


@pytest.mark.parametrize("task", ["segment", "semantic"])
def test_prepare_reads_it(folder, tmp_path, task):
    out = folder / "labels" / "coco-panoptic"
    summary = prepare(
        "panoptic", tmp_path / "shards", annotations=out / f"{task}.json", segments=out / task,
        images=folder / "photos", workers=0,
    )  # fmt: skip
    assert (summary["rows"], summary["rejected"]) == (2, 0)
    found = {row["image_id"]: row["instances"] for row in read_rows(tmp_path / "shards")}
    assert [i["phrase"] for i in found["a/one.png"]] == (["cat", "cat", "sky"] if task == "segment" else ["cat", "sky"])
    assert found["two.png"] == []


def test_parts_have_folders_of_their_own(folder, tmp_path):
    export_labels(folder / "labels", ["coco-panoptic"], output=tmp_path, tasks=["segment"], max_images_per_file=1)
    names = sorted(path.relative_to(tmp_path / "coco-panoptic").as_posix() for path in tmp_path.rglob("*.*"))
    assert [name for name in names if "marker" not in name and not name.startswith(".")] == [
        *("segment-00001.json", "segment-00001/a_one.png", "segment-00002.json", "segment-00002/two.png"),
    ]


def test_a_picture_takes_seven_bytes_a_pixel(tmp_path):
    """Of arrays; Pillow's encoder adds none."""
    side = 2000
    mask = np.zeros((1, side, side), bool)
    mask[0, 200:1500, 100:1900] = True
    base = dict.fromkeys(LABEL_SCHEMA.names) | {"image_id": "a.png", "path": "a.png", "provenance": ""}
    base |= {"task": "segment", "height": side, "width": side, "box": [100.0, 200.0, 1900.0, 1500.0]}
    found = [base | {"phrase": "cat", "score": s, "mask": Masks.from_arrays(mask).rles[0]} for s in (0.9, 0.8)]
    ledger = Ledger(tmp_path)
    ledger.open({"tasks": ["segment"], "classes": ["cat"]})
    for fragment in ledger.plan().fragments(FakeListing([Item("a.png", "a.png")])):
        ledger.publish(fragment.index, 1, found, [])
    tracemalloc.start()
    export_labels(tmp_path, ["coco-panoptic"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 * side**2 + 2_000_000
    written = json.loads((tmp_path / "coco-panoptic" / "segment.json").read_text())
    (segment,) = written["annotations"][0]["segments_info"]
    assert segment["area"] == 1300 * 1800
