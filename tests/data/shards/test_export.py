"""COCO in, shards, COCO out: the same boxes, masks, keypoints and captions."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from support.source_fakes import HEIGHT, WIDTH, coco_set, instance, jpeg, prepared, write

from lumen_ray.data.shards import shards
from lumen_ray.data.shards.export import export_coco
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.sources.coco import CocoSource
from lumen_ray.errors import UserError

NAMES = ["nose", "left eye", "right eye"]
CATEGORIES = [
    {"id": 7, "name": "cat"},
    {"id": 3, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3]]},
]


def corners(bbox):
    """A COCO box as stored in shards: float32 xyxy clipped to the image."""
    x, y, w, h = (np.float64(c) for c in bbox)
    return np.clip(np.array([x, y, x + w, y + h]).astype(np.float32), 0, np.float32([WIDTH, HEIGHT] * 2))


@st.composite
def masks(draw):
    """An object's pixels as compressed RLE, uncompressed RLE or a polygon, and the expected compressed string."""
    kind = draw(st.sampled_from(["compressed", "runs", "polygon", None]))
    if kind is None:
        return None, None
    if kind == "polygon":
        points = draw(st.lists(st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT)), min_size=3, max_size=6))
        polygon = [float(c) for point in points for c in point]
        rle = coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))
        return ([polygon], rle["counts"].decode()) if coco_mask.area(rle) else (None, None)
    ends = sorted(draw(st.lists(st.integers(1, HEIGHT * WIDTH - 1), min_size=1, max_size=12, unique=True)))
    runs = np.diff([0, *ends, HEIGHT * WIDTH]).tolist()
    if runs[0] > 1 and draw(st.booleans()):  # a code that no encoder would write: it must not be written anew
        runs[:1] = [runs[0] - 1, 0, 1]
    size = [HEIGHT, WIDTH]
    counts = coco_mask.frPyObjects({"size": size, "counts": runs}, HEIGHT, WIDTH)["counts"].decode()
    return {"size": size, "counts": runs if kind == "runs" else counts}, counts


@st.composite
def annotations(draw):
    segmentation, counts = draw(masks())
    x, y = draw(st.floats(0, WIDTH - 2)), draw(st.floats(0, HEIGHT - 2))
    entry = {"bbox": [x, y, draw(st.floats(0.1, WIDTH)), draw(st.floats(0.1, HEIGHT))]}
    entry["category_id"] = draw(st.sampled_from([7, 3]))
    entry["iscrowd"] = int(draw(st.booleans()))
    entry["area"] = draw(st.floats(0.5, HEIGHT * WIDTH, width=32))
    if segmentation is not None:
        entry["segmentation"] = segmentation
    if entry["category_id"] == 3:
        point = st.tuples(
            st.floats(0, WIDTH, width=32), st.floats(0, HEIGHT, width=32), st.sampled_from([0.0, 1.0, 2.0])
        )
        points = [(x, y, v) if v else (0.0, 0.0, 0.0) for x, y, v in draw(st.tuples(point, point, point))]
        entry["keypoints"] = [c for p in points for c in p]
    return entry, counts


def place_of(entry):
    """Class and box as stored, by which a repeated object is found."""
    return entry["category_id"], *corners(entry["bbox"]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(annotations(), max_size=4, unique_by=lambda a: place_of(a[0])), min_size=1, max_size=3),
       st.text(min_size=1, max_size=20))  # fmt: skip
def test_coco_comes_out_as_it_went_in(images, caption):
    entries = [{"id": 100 * i + n, "image_id": i, **entry}
               for i, found in enumerate(images) for n, (entry, _) in enumerate(found)]  # fmt: skip
    expected_counts = [counts for found in images for _, counts in found]
    listed = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(len(images))]
    contents = {f"images/{i}.jpg": jpeg() for i in range(len(images))}
    contents["a.json"] = json.dumps({"images": listed, "annotations": entries, "categories": CATEGORIES})
    contents["b.json"] = json.dumps({"images": listed, "annotations": [{"id": 1, "image_id": 0, "caption": caption}]})
    with tempfile.TemporaryDirectory() as folder:
        base = write(Path(folder) / "in", contents)
        source = CocoSource([f"{base}/a.json", f"{base}/b.json"], f"{base}/images")
        first, rejected, _ = prepared(source, f"{folder}/one")
        export_coco(f"{folder}/one", f"{folder}/out", images=True)
        data = json.loads(Path(f"{folder}/out/instances.json").read_text())
        again = [f"{folder}/out/instances.json"]
        if Path(f"{folder}/out/captions.json").exists():
            again.append(f"{folder}/out/captions.json")
        second, rejected_again, _ = prepared(CocoSource(again, f"{folder}/out/images"), f"{folder}/two")
        assert all("caption" in r["reason"] for r in rejected)
        assert rejected_again == []
    names = {image["id"]: image["file_name"] for image in data["images"]}
    got = sorted(data["annotations"], key=lambda a: (names[a["image_id"]], a["id"]))
    classes = {c["id"]: c["name"] for c in data["categories"]}
    assert len(got) == len(entries)
    for old, new, counts in zip(entries, got, expected_counts, strict=True):
        assert (corners(new["bbox"]) == corners(old["bbox"])).all()
        assert new.get("segmentation", {}).get("counts") == counts
        assert new.get("keypoints") == old.get("keypoints")
        assert (new["iscrowd"], new["area"]) == (old["iscrowd"], old["area"])
        assert classes[new["category_id"]] == {7: "cat", 3: "person"}[old["category_id"]]
    assert [{k: v for k, v in c.items() if k != "id"} for c in data["categories"]] == [
        {k: v for k, v in c.items() if k != "id"} for c in CATEGORIES
    ]
    assert first == second


@pytest.mark.parametrize("name", ["coco_photos", "nuclei"])
def test_real_sets_come_out_as_they_went_in(test_data, tmp_path, name):
    folder = test_data / name
    paths = sorted(str(p) for p in (folder / "annotations").glob("*_val.json" if name == "nuclei" else "*_train.json"))
    prepare_source(tmp_path / "one", CocoSource(paths, str(folder / "images")), workers=0)
    counts = export_coco(tmp_path / "one", tmp_path / "out")
    written = shards.read_manifest(tmp_path / "one")["counts"]["annotations"]["written"]
    assert counts["annotations"] + counts["captions"] == written
    data = json.loads((tmp_path / "out" / "instances.json").read_text())
    found = {}
    for annotation in data["annotations"]:
        file_name = data["images"][annotation["image_id"] - 1]["file_name"]
        found.setdefault(file_name, []).append(annotation)
    rles = boxes = points = 0
    for path in paths:
        raw = json.loads(Path(path).read_text())
        by_id = {i["id"]: i for i in raw["images"]}
        for entry in raw["annotations"]:
            if "bbox" not in entry:
                continue
            image = by_id[entry["image_id"]]
            limit = np.float32([image["width"], image["height"]] * 2)
            x, y, w, h = entry["bbox"]
            corner = np.clip(np.float64([x, y, x + w, y + h]).astype(np.float32), 0, limit)
            same = [a for a in found[image["file_name"]] if (np.float32(_xyxy(a["bbox"])) == corner).all()]
            assert same
            boxes += 1
            segmentation = entry.get("segmentation")
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
                assert segmentation["counts"] in [a["segmentation"]["counts"] for a in same]
                rles += 1
            if any(entry.get("keypoints") or ()):
                assert entry["keypoints"] in [a.get("keypoints") for a in same]
                points += 1
    assert boxes > 500
    assert rles > 0
    assert points > 0 or name == "nuclei"
    again = [str(p) for p in sorted((tmp_path / "out").glob("*.json"), reverse=True)]
    prepare_source(tmp_path / "two", CocoSource(again, str(folder / "images")), workers=0)
    before, after = ({r["image_id"]: r for r in shards.read_rows(tmp_path / n)} for n in ("one", "two"))
    assert before.keys() == after.keys()
    for image_id, row in before.items():
        assert {**row, "classes": sorted(row["classes"])} == {
            **after[image_id],
            "classes": sorted(after[image_id]["classes"]),
        }


def _xyxy(bbox):
    x, y, w, h = bbox
    return [x, y, x + w, y + h]


def test_federated_classes_survive(tmp_path):
    contents = coco_set()
    data = json.loads(contents["instances.json"])
    data["categories"].append({"id": 3, "name": "tree"})
    data["images"][0] |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [1]}
    data["images"][1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    write(tmp_path, contents | {"instances.json": json.dumps(data)})
    source = CocoSource([f"{tmp_path}/instances.json"], f"{tmp_path}/images")
    for number in range(2):
        rows, _, _ = prepared(source, tmp_path / f"shards{number}")
        classes = {name: sorted(row["classes"]) for name, row in rows.items()}
        assert classes == {"0.jpg": ["person", "tree"], "1.jpg": ["person"], "2.jpg": ["cell", "person", "tree"]}
        export_coco(tmp_path / f"shards{number}", tmp_path / "out")
        source = CocoSource([f"{tmp_path}/out/instances.json"], f"{tmp_path}/images")


def test_exhaustive_classes_are_compared_with_all_categories(tmp_path):
    """Shards without categories: the first image is annotated for one class alone, the second shows another."""
    rows = [
        make_row(f"{name}.jpg", jpeg(), (HEIGHT, WIDTH), "x", classes=[name], instances=[instance(name, [1, 1, 9, 9])])
        for name in ("cat", "dog")
    ]
    with shards.ShardWriter(tmp_path / "in", "part-00000.parquet") as writer:
        for row in rows:
            writer.write(row)
    shards.write_manifest(tmp_path / "in", shards.build_manifest([writer.entry]))
    export_coco(tmp_path / "in", tmp_path / "out", images=True)
    again, _, _ = prepared(CocoSource([f"{tmp_path}/out/instances.json"], f"{tmp_path}/out/images"), tmp_path / "two")
    assert {name: row["classes"] for name, row in again.items()} == {"cat.jpg": ["cat"], "dog.jpg": ["dog"]}


def test_rows_without_image_are_counted_and_names_stay_inside(tmp_path):
    rows = [make_row("a", None, (0, 0), "x"), make_row("../b.jpg", jpeg(), (HEIGHT, WIDTH), "x")]
    with shards.ShardWriter(tmp_path / "in", "part-00000.parquet") as writer:
        for row in rows:
            writer.write(row)
    shards.write_manifest(tmp_path / "in", shards.build_manifest([writer.entry]))
    counts = export_coco(tmp_path / "in", tmp_path / "out")
    assert {kind: number for kind, number in counts.items() if number} == {"images": 1, "without_image": 1}
    with pytest.raises(UserError, match="cannot be a file name"):
        export_coco(tmp_path / "in", tmp_path / "out", images=True)


def test_captions_of_several_images_are_left_out(tmp_path):
    messages = [make_message("caption", "differ?", "in colour", image_turns=(0,)), make_message("caption", "?", "red")]
    further = [{"image": jpeg(HEIGHT + 8), "height": HEIGHT + 8, "width": WIDTH}]
    row = make_row("b.jpg", jpeg(), (HEIGHT, WIDTH), "x", messages=messages, further_images=further)
    with shards.ShardWriter(tmp_path / "in", "part-00000.parquet") as writer:
        writer.write(row)
    shards.write_manifest(tmp_path / "in", shards.build_manifest([writer.entry]))
    counts = export_coco(tmp_path / "in", tmp_path / "out", images=True)
    assert {kind: n for kind, n in counts.items() if n} == {"images": 1, "captions": 1, "further_images_left_out": 1}
    found = json.loads((tmp_path / "out" / "captions.json").read_text())["annotations"]
    assert [annotation["caption"] for annotation in found] == ["red"]


@pytest.mark.parametrize("output", ["file", "file/x", "/proc/x", "/proc"])
def test_an_output_that_cannot_be_made_is_reported(tmp_path, output):
    (tmp_path / "file").write_text("x")
    with shards.ShardWriter(tmp_path / "in", "part-00000.parquet") as writer:
        writer.write(make_row("b.jpg", jpeg(), (HEIGHT, WIDTH), "x"))
    shards.write_manifest(tmp_path / "in", shards.build_manifest([writer.entry]))
    with pytest.raises(UserError, match=" cannot be (made|written): ") as error:
        export_coco(tmp_path / "in", tmp_path / output)
    assert error.value.reason == "invalid_output" and "\n" not in str(error.value)


def test_colliding_names_are_numbered(tmp_path):
    """Equal ids, as shards of older versions have them, ids that differ by case, and one that gets its suffix here."""
    pictures = [jpeg(20 + n, 30) for n in range(5)]
    with shards.ShardWriter(tmp_path, "part-00000.parquet") as writer:
        for name, data in zip(("a.jpg", "a.jpg", "A.JPG", "a", "a_2.jpg"), pictures, strict=True):
            writer.write(make_row(name, data, (20, 30), "x"))
    shards.write_manifest(tmp_path, shards.build_manifest([writer.entry]))
    export_coco(tmp_path, tmp_path / "out", images=True)
    listed = json.loads((tmp_path / "out" / "instances.json").read_text())["images"]
    names = [image["file_name"] for image in listed]
    assert names == ["a.jpg", "a_2.jpg", "A_3.JPG", "a_4.jpg", "a_2_2.jpg"]
    assert [(tmp_path / "out" / "images" / name).read_bytes() for name in names] == pictures


def test_captions_of_an_earlier_export_do_not_stay(tmp_path):
    for name, messages in (("first", [make_message("caption", "", "a cat")]), ("second", [])):
        with shards.ShardWriter(tmp_path / name, "part-00000.parquet") as writer:
            writer.write(make_row("a.jpg", jpeg(), (HEIGHT, WIDTH), "x", tasks=["detect"], messages=messages))
        shards.write_manifest(tmp_path / name, shards.build_manifest([writer.entry]))
        export_coco(tmp_path / name, tmp_path / "out")
        assert (tmp_path / "out" / "captions.json").exists() == bool(messages)
