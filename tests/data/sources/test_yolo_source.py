"""YOLO labels to rows: boxes, polygons and poses in the rotated frame, and where images and labels are found."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from support.source_fakes import HEIGHT, WIDTH, jpeg, png, prepared, write, yolo_set

from lumen_ray.data.batches.transforms import mirror_order
from lumen_ray.data.shards import shards
from lumen_ray.data.sources.yolo import YoloSource
from lumen_ray.errors import UserError

CLASSES = "classes.txt"


def one(folder, labels, image=None, yaml=""):
    """The row of one image with the given label lines."""
    settings = f"train: images\nnames: [cat, dog]\n{yaml}"
    contents = {"images/a.jpg": jpeg() if image is None else image, "labels/a.txt": labels, "data.yaml": settings}
    rows, rejected, counts = prepared(YoloSource(f"{write(folder, contents)}/data.yaml"), folder / "out")
    return rows["a.jpg"], rejected, counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 50), st.floats(0, 30), st.floats(1, 10), st.floats(1, 10)),
                min_size=1, max_size=6, unique=True))  # fmt: skip
def test_boxes_come_back(boxes):
    lines = [f"{c} {(x + w / 2) / WIDTH!r} {(y + h / 2) / HEIGHT!r} {w / WIDTH!r} {h / HEIGHT!r}"
             for c, x, y, w, h in boxes]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        row, rejected, _ = one(Path(folder), "\n".join(lines))
    assert rejected == []
    assert [i["phrase"] for i in row["instances"]] == ["cat" if c == 0 else "dog" for c, *_ in boxes]
    expected = [[x, y, x + w, y + h] for _, x, y, w, h in boxes]
    assert np.array([i["box"] for i in row["instances"]]) == pytest.approx(np.array(expected), abs=1e-4)


def test_polygons_become_masks_with_their_box(tmp_path):
    points = [(6, 4), (30, 4), (30, 24)]
    row, rejected, _ = one(tmp_path, "1 " + " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in points))
    assert rejected == []
    (found,) = row["instances"]
    assert found["box"] == pytest.approx([6, 4, 30, 24], abs=1e-4)
    flat = [float(c) for point in points for c in point]
    expected = coco_mask.decode(coco_mask.frPyObjects([flat], HEIGHT, WIDTH)[0])
    got = coco_mask.decode(found["mask"])
    assert (got != expected).sum() <= 2  # rasterised from numbers that differ in the last bit
    assert row["tasks"] == ["detect", "count", "segment"]


@pytest.mark.parametrize(("orientation", "size"), [(1, (HEIGHT, WIDTH)), (3, (HEIGHT, WIDTH)), (6, (WIDTH, HEIGHT))])
def test_shares_are_of_the_rotated_image(tmp_path, orientation, size):
    row, _, _ = one(tmp_path, "0 0.5 0.25 1.0 0.5", jpeg(orientation=orientation))
    height, width = size
    assert (row["height"], row["width"]) == size
    assert row["instances"][0]["box"] == [0, 0, width, height / 2]


def test_poses_with_and_without_visibility(tmp_path):
    box = "0 0.5 0.5 0.5 0.5"
    row, _, _ = one(tmp_path / "a", f"{box} 0.5 0.25 2 0.25 0.5 1 0.3 0.3 0", yaml="kpt_shape: [3, 3]")
    assert row["instances"][0]["keypoints"] == [30, 10, 2, 15, 20, 1, 0, 0, 0]
    row, _, _ = one(tmp_path / "b", f"{box} 0.5 0.25 0 0 -1 -1", yaml="kpt_shape: [3, 2]")
    assert row["instances"][0]["keypoints"] == [30, 10, 2, 0, 0, 0, 0, 0, 0]
    row, _, _ = one(tmp_path / "c", f"{box} 0 0 0 0", yaml="kpt_shape: [2, 2]")
    assert row["instances"][0]["keypoints"] is None
    assert "pose" not in row["tasks"]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_default_names_mirror_like_flip_idx(data):
    count = data.draw(st.integers(1, 8))
    order = data.draw(st.permutations(range(count)))
    pairs = data.draw(st.integers(0, count // 2))
    flip = list(range(count))
    for k in range(pairs):
        flip[order[2 * k]], flip[order[2 * k + 1]] = order[2 * k + 1], order[2 * k]
    with tempfile.TemporaryDirectory() as folder:
        one(Path(folder), "", yaml=f"kpt_shape: [{count}, 3]\nflip_idx: {flip}")
        (cat, _) = shards.read_manifest(f"{folder}/out")["categories"]
    assert list(mirror_order(tuple(cat["keypoints"]))) == flip


def test_keypoint_names_of_the_yaml(tmp_path):
    one(tmp_path, "", yaml="kpt_shape: [2, 3]\nkpt_names: {0: [nose, tail]}")
    cat, dog = shards.read_manifest(tmp_path / "out")["categories"]
    assert cat["keypoints"] == ["nose", "tail"]
    assert dog["keypoints"] == ["point 1", "point 2"]


def test_empty_and_missing_label_files_are_negatives(tmp_path):
    contents = yolo_set()
    del contents["labels/train/1.txt"]
    rows, rejected, counts = prepared(YoloSource(f"{write(tmp_path, contents)}/data.yaml"), tmp_path / "out")
    assert rejected == []
    for name in ("1.jpg", "2.jpg"):
        assert (rows[name]["instances"], rows[name]["classes"]) == ([], ["cat", "dog"])
        assert rows[name]["tasks"] == ["detect", "count"]
    assert counts["annotations"] == {"in": 2, "written": 2, "rejected": 0}


@pytest.mark.parametrize(
    ("line", "reason", "classes"),
    [
        ("0 0.5 0.5 0.2", "3 or more points", ["dog"]),
        ("0 0.5 0.5 0.2 0.2 0.9", "3 or more points", ["dog"]),
        ("0 0.5 0.5 20 30", "are they pixels", ["dog"]),
        ("0 nan 0.5 0.2 0.2", "not numbers", ["dog"]),
        ("0 0.5 0.5 0 0.2", "degenerate box", ["cat", "dog"]),
        ("1 0.5 0.5 x 0.2", "not numbers", ["cat"]),
        ("7 0.5 0.5 0.2 0.2", "class '7' is not one of 0..1", []),
        ("cat 0.5 0.5 0.2 0.2", "class 'cat' is not one of 0..1", []),
        ("1 0.250 .25 5e-1 0.50", "repeats an earlier object", ["cat", "dog"]),
    ],
)
def test_a_bad_line_alone_is_rejected(tmp_path, line, reason, classes):
    row, rejected, counts = one(tmp_path, f"1 0.25 0.25 0.5 0.5\n\n{line}\n")
    (record,) = rejected
    assert reason in record["reason"]
    assert record["origin"] == "a.txt line 3"
    assert counts["annotations"] == {"in": 2, "written": 1, "rejected": 1}
    assert row["classes"] == classes


def test_folders_and_classes_without_a_yaml(tmp_path):
    line = "1 0.25 0.25 0.5 0.5"
    write(tmp_path, {"photos/x/a.jpg": jpeg(), "notes/x/a.txt": line, "photos/b.png": jpeg(), CLASSES: "cat\ndog\n\n"})
    source = YoloSource(images=f"{tmp_path}/photos", labels=f"{tmp_path}/notes", classes=f"{tmp_path}/{CLASSES}")
    rows, _, _ = prepared(source, tmp_path / "out")
    assert sorted(rows) == ["b.png", "x/a.jpg"]
    assert rows["x/a.jpg"]["instances"][0]["phrase"] == "dog"


@pytest.mark.parametrize(
    ("place", "ids"),
    [
        ("images/train", ["0.jpg", "1.jpg", "2.jpg"]),
        ("../images/train", ["0.jpg", "1.jpg", "2.jpg"]),
        ("list.txt", ["images/train/0.jpg", "images/train/2.jpg"]),
        ("[images/train, images/more]", ["more/0.jpg", "train/0.jpg", "train/1.jpg", "train/2.jpg"]),
    ],
)
def test_splits_are_folders_lists_or_both(tmp_path, place, ids):
    contents = yolo_set() | {"data.yaml": f"train: {place}\nnames: [cat, dog]\n"}
    contents |= {"list.txt": "./images/train/0.jpg\nimages/train/2.jpg\n", "images/more/0.jpg": jpeg()}
    rows, _, _ = prepared(YoloSource(f"{write(tmp_path, contents)}/data.yaml"), tmp_path / "out")
    assert sorted(rows) == ids
    assert sum(len(row["instances"]) for row in rows.values()) == 2 * sum(i[-5] in "01" for i in ids if "more" not in i)


@pytest.mark.parametrize("lists", [False, True])
def test_folders_of_one_name_do_not_hide_each_other(tmp_path, lists):
    """Images of the same name in two sites, each with its own labels, by folders or by lists."""
    contents = {"data.yaml": "train: [siteA/images, siteB/images]\nnames: [cat, dog]\n"}
    if lists:
        contents["data.yaml"] = "train: [siteA/list.txt, siteB/list.txt]\nnames: [cat, dog]\n"
    for number, site in enumerate(("siteA", "siteB")):
        contents |= {f"{site}/images/{name}": jpeg() for name in ("0.jpg", "1.jpg")}
        contents |= {f"{site}/labels/{i}.txt": f"{number} 0.5 0.5 0.2 0.2" for i in range(2)}
        contents[f"{site}/list.txt"] = "./images/0.jpg\n./images/1.jpg\n"
    rows, rejected, counts = prepared(YoloSource(f"{write(tmp_path, contents)}/data.yaml"), tmp_path / "out")
    assert rejected == []
    assert counts["images"] == {"in": 4, "written": 4, "rejected": 0}
    assert {name: row["instances"][0]["phrase"] for name, row in rows.items()} == {
        f"{site}/images/{i}.jpg": phrase for site, phrase in (("siteA", "cat"), ("siteB", "dog")) for i in range(2)
    }


def test_repeated_images_of_a_split_are_rejected_and_counted(tmp_path):
    contents = yolo_set() | {"data.yaml": "train: [list.txt, more/list.txt]\nnames: [cat, dog]\n"}
    contents |= {"more/list.txt": "images/train/1.jpg\n", "more/images/0.jpg": jpeg()}
    contents["list.txt"] = "images/train/0.jpg\nimages/train/1.jpg\nimages/train/0.jpg\n"
    rows, rejected, counts = prepared(YoloSource(f"{write(tmp_path, contents)}/data.yaml"), tmp_path / "out")
    assert sorted(rows) == ["images/train/0.jpg", "images/train/1.jpg"]
    assert counts["images"] == {"in": 4, "written": 2, "rejected": 2}
    assert [(r["origin"], r["reason"]) for r in rejected] == [
        ("list.txt line 3", "the split lists this image twice"),
        ("list.txt line 1", "the split lists this image twice"),
    ]


def test_a_name_that_another_image_has_is_rejected(tmp_path):
    contents = yolo_set() | {"data.yaml": "train: [images/train, list.txt]\nnames: [cat, dog]\n"}
    contents |= {"list.txt": "train/0.jpg\n", "train/0.jpg": jpeg()}
    rows, (record,), counts = prepared(YoloSource(f"{write(tmp_path, contents)}/data.yaml"), tmp_path / "out")
    assert len(rows["train/0.jpg"]["instances"]) == 2
    assert counts["images"] == {"in": 4, "written": 3, "rejected": 1}
    assert record["image_id"] == "train/0.jpg"
    assert "lists another image of this name before" in record["reason"]


def test_missing_labels_are_reported(tmp_path):
    contents = yolo_set() | {CLASSES: "cat\ndog\n", "elsewhere/7.txt": "0 0.5 0.5 0.2 0.2"}
    write(tmp_path, {name: data for name, data in contents.items() if not name.startswith("labels/")})
    images, classes = f"{tmp_path}/images/train", f"{tmp_path}/{CLASSES}"
    for source, message in (
        (YoloSource(f"{tmp_path}/data.yaml"), f"none of 3 images has a label file in '{tmp_path}/labels/train'"),
        (
            YoloSource(images=images, classes=classes, labels=f"{tmp_path}/nowhere"),
            "nowhere' does not exist; give --la",
        ),
        (
            YoloSource(images=images, classes=classes, labels=f"{tmp_path}/elsewhere"),
            "has a label file in '.*elsewhere'",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            source.read_listing()
        assert "--labels" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: [", "not valid yaml"),
        ("- 3", "must contain settings"),
        ("val: images\nnames: [a]", "no split 'train'; splits: val"),
        ("train: nowhere\nnames: [a]", "names 'nowhere', which is not at"),
        ("train: images/train", "needs class names"),
        ("train: images/train\nnames: {1: a, 2: b}", "needs class names"),
        ("train: images/train\nnames: [a, a]", "names a class twice"),
        ("train: images/train\nnames: [a]\nnc: 2", "says nc: 2 but names 1"),
        ("train: images/train\nnames: [a]\nkpt_shape: 3", "kpt_shape must be"),
        ("train: images/train\nnames: [a]\nkpt_shape: [2, 3]\nflip_idx: [0, 0]", "flip_idx must contain each"),
        ("train: images/train\nnames: [a]\nkpt_shape: [3, 3]\nflip_idx: [1, 2, 0]", "flip_idx must exchange pairs"),
        ("train: images/train\nnames: [a]\nkpt_shape: [2, 3]\nkpt_names: [x]", "kpt_names must be 2 different"),
    ],
)
def test_a_yaml_that_cannot_work_is_refused(tmp_path, yaml, message):
    write(tmp_path, yolo_set() | {"data.yaml": yaml})
    with pytest.raises(UserError, match=message) as error:
        YoloSource(f"{tmp_path}/data.yaml").read_listing()
    assert "\n" not in str(error.value)


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    for options, message in (
        ({}, "either --data"),
        ({"data": "a", "images": "b"}, "either --data"),
        ({"images": "b"}, "also needs --classes"),
    ):
        with pytest.raises(UserError, match=message):
            YoloSource(**options)


def listed(tmp_path, contents, **options):
    source = YoloSource(**(options or {"data": f"{write(tmp_path, contents)}/data.yaml"}))
    return *prepared(source, tmp_path / "out"), source.read_listing().notes


def test_images_that_share_a_label_file_are_rejected(tmp_path):
    contents = yolo_set() | {"images/train/0.png": png(np.zeros((HEIGHT, WIDTH, 3)))}
    rows, rejected, counts, _ = listed(tmp_path, contents)
    assert set(rows) == {"1.jpg", "2.jpg"}
    assert [(r["image_id"], r["rule"]) for r in rejected] == [
        ("0.jpg", "ambiguous_label"),
        ("0.png", "ambiguous_label"),
    ]
    assert counts["images"] == {"in": 4, "written": 2, "rejected": 2}


@pytest.mark.parametrize(("image", "label"), [("a b.JPG", "a b.TXT"), ("e\u0301.jpg", "\u00e9.txt")])
def test_labels_are_found_in_another_spelling(tmp_path, image, label):
    contents = {"data.yaml": "train: images\nnames: [cat]\n", f"images/{image}": jpeg(),
                f"labels/{label}": "0 .5 .5 .2 .2\n", "images/b.jpg": jpeg(), "labels/b.txt": ""}  # fmt: skip
    rows, _, _, notes = listed(tmp_path, contents)
    assert len(rows[image]["instances"]) == 1 and notes == []


def test_files_that_are_left_out_are_named(tmp_path):
    contents = yolo_set() | {"images/train/3.heic": b"x", "labels/train/3.txt": "0 .5 .5 .2 .2\n",
                             "images/train/._0.jpg": b"x", "labels/train/classes.txt": "cat\ndog\n",
                             "images/train/4.jfif": jpeg(), "labels/train/4.txt": ""}  # fmt: skip
    rows, rejected, _, notes = listed(tmp_path, contents)
    assert rejected == [] and set(rows) == {"0.jpg", "1.jpg", "2.jpg", "4.jfif"}
    assert notes == [
        "left out in 'train': 1 file not of a picture format that is read (.heic 1)",
        "1 label files belong to no image that is read: '3.txt'",
    ]


YAMLS = {
    "quoted numbers": ('nc: "2"\nnames:\n  "0": cat\n  "1": dog\n', ["cat", "dog"]),
    "booleans": ("names: [yes, no]\n", ["yes", "no"]),
    "numbers": ("names: [2020, 010]\nnc: 2.0\n", ["2020", "010"]),
    "null": ("names: [null, ~]\nval:\ntest: null\n", ["null", "~"]),
}


@pytest.mark.parametrize(("yaml", "names"), YAMLS.values(), ids=YAMLS)
def test_class_names_are_texts(tmp_path, yaml, names):
    contents = yolo_set() | {"data.yaml": f"train: images/train\n{yaml}"}
    rows, _, _, _ = listed(tmp_path, contents)
    assert rows["0.jpg"]["classes"] == names
    with pytest.raises(UserError, match="has no split 'test'"):
        YoloSource(f"{tmp_path}/data.yaml", "test").read_listing()


def test_a_thin_polygon_keeps_its_box(tmp_path):
    row, rejected, _ = one(tmp_path, "0 0.1 0.1 0.9 0.1 0.9 0.105 0.1 0.105\n")
    assert rejected == []
    assert row["instances"][0]["mask"] is None and row["classes"] == ["cat", "dog"]


def test_an_image_whose_labels_may_be_elsewhere_is_no_negative(tmp_path):
    contents = yolo_set() | {"images/train/3.jpg": jpeg(), "labels/train/3.jpg.txt": "0 .5 .5 .2 .2\n"}
    rows, rejected, _, notes = listed(tmp_path, contents)
    assert "3.jpg" not in rows
    assert [r["rule"] for r in rejected] == ["missing_labels"] and "'3.jpg.txt' beside it" in rejected[0]["reason"]
    assert notes == ["1 label files belong to no image that is read: '3.jpg.txt'"]


def test_labels_of_images_that_the_split_does_not_list_do_not_matter(tmp_path):
    contents = yolo_set() | {"data.yaml": "train: list.txt\nnames: [cat, dog]\n", "images/train/3.jpg": jpeg(),
                             "list.txt": "images\\train\\0.jpg\nimages/train/3.JPG\n"}  # fmt: skip
    rows, rejected, _, notes = listed(tmp_path, contents)
    assert rejected == [] and notes == []
    assert {name: len(row["instances"]) for name, row in rows.items()} == {
        "images/train/0.jpg": 2,
        "images/train/3.JPG": 0,
    }


def test_a_folder_without_any_labels_is_named(tmp_path):
    contents = yolo_set() | {"data.yaml": "train: [images/train, images/more]\nnames: [cat, dog]\n",
                             "images/more/0.jpg": jpeg()}  # fmt: skip
    _, rejected, _, notes = listed(tmp_path, contents)
    assert rejected == [] and notes[0].startswith("none of 1 images has its label file in ")


def test_labels_of_other_classes_are_refused(tmp_path):
    contents = yolo_set() | {"labels/train/0.txt": "7 .5 .5 .2 .2\n", "labels/train/1.txt": "8 .5 .5 .2 .2\n"}
    with pytest.raises(UserError, match="2 of 2 annotations name a class .*class '7' is not one of 0..1"):
        listed(tmp_path, contents)


def test_a_blank_line_among_class_names_is_refused(tmp_path):
    write(tmp_path, yolo_set() | {"classes.txt": "cat\n\ndog\n"})
    with pytest.raises(UserError, match="line 2 of .* is blank"):
        YoloSource(images=f"{tmp_path}/images", classes=f"{tmp_path}/classes.txt").read_listing()


def test_a_yaml_nested_too_deeply_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not valid yaml: it is nested too deeply"):
        listed(tmp_path, yolo_set() | {"data.yaml": "train: " + "[" * 3000})
