"""COCO json to rows: merging of files, and what is refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lumen_ray.data.images import decode
from lumen_ray.data.scenes.render import encode_jpeg
from lumen_ray.data.sources import coco, coco_json
from lumen_ray.data.sources.objects import ASSUMED
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Masks

HEIGHT, WIDTH = 40, 60
JPEG = encode_jpeg(np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
IMAGE = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}
CATEGORIES = [{"id": 1, "name": "cell"}, {"id": 2, "name": "person"}]
SKELETON = [{"id": 7, "name": "person", "keypoints": ["head", "foot"], "skeleton": [[1, 2]]}]


@pytest.fixture
def load(tmp_path):
    """Writes COCO dictionaries to files and loads them."""

    def write_and_load(*parts):
        paths = [tmp_path / f"part{number}.json" for number in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            path.write_text(json.dumps({"images": [IMAGE], "annotations": [], **part}))
        return coco_json.load(paths)

    return write_and_load


def annotation(**changes):
    return {"id": 5, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 30], "iscrowd": 0, **changes}


def row_of(loaded, image=JPEG):
    (record,) = loaded.images
    return row_and_rejected(loaded, record, image)


def row_and_rejected(loaded, record, image):
    keypoints = {category["name"]: len(category["keypoints"]) for category in loaded.categories}
    outcome = coco.to_row(record, image, keypoints, record.classes(loaded.classes), "test")
    listed = len(record.annotations) + len(record.captions)
    assert outcome.written.get("annotations", 0) + sum(r["kind"] == "annotations" for r in outcome.rejected) == listed
    return outcome.row, outcome.rejected


def test_boxes_become_xyxy_and_are_clipped(load):
    loaded = load({"categories": CATEGORIES, "annotations": [annotation(), annotation(bbox=[50, -5, 20, 15])]})
    row, rejected = row_of(loaded)
    assert rejected == []
    assert [i["box"] for i in row["instances"]] == [[10, 5, 30, 35], [50, 0, 60, 10]]
    assert [i["area"] for i in row["instances"]] == [600, 100]
    assert row["image"] == JPEG
    assert (row["image_id"], row["height"], row["width"], row["source"]) == ("a.jpg", HEIGHT, WIDTH, "test")
    assert row["classes"] == ["cell", "person"]
    assert row["tasks"] == ["detect", "count"]


def test_an_image_without_objects_is_a_negative_example(load):
    row, rejected = row_of(load({"categories": CATEGORIES}))
    assert (row["instances"], rejected) == ([], [])
    assert row["tasks"] == ["detect", "count"]


def test_masks_of_every_kind(load):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:35, 10:30] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    runs = [10 * HEIGHT + 5] + [30, 10] * 19 + [30, 5 + 30 * HEIGHT]
    size = [HEIGHT, WIDTH]
    kinds = [
        [[10, 5, 30, 5, 30, 35, 10, 35]],
        {"size": size, "counts": encoded},
        {"size": size, "counts": runs},
    ]
    loaded = load(
        {
            "categories": CATEGORIES,
            "annotations": [
                annotation(bbox=[10 + n, 5, 20, 30], segmentation=kind, iscrowd=int(n == 2))
                for n, kind in enumerate(kinds)
            ],
        }
    )
    row, rejected = row_of(loaded)
    assert rejected == []
    assert [i["mask"] for i in row["instances"]] == [{"size": size, "counts": encoded}] * 3
    assert [i["crowd"] for i in row["instances"]] == [False, False, True]
    assert row["tasks"] == ["detect", "count", "segment"]


def test_a_box_is_taken_from_the_mask_where_none_is_given(load):
    entry = annotation(segmentation=[[10, 5, 30, 5, 30, 35, 10, 35]])
    del entry["bbox"]
    row, _ = row_of(load({"categories": CATEGORIES, "annotations": [entry]}))
    assert row["instances"][0]["box"] == [10, 5, 30, 35]


def test_segment_needs_a_mask_of_every_object(load):
    entries = [annotation(segmentation=[[10, 5, 30, 5, 30, 35]]), annotation(bbox=[1, 1, 5, 5])]
    row, _ = row_of(load({"categories": CATEGORIES, "annotations": entries}))
    assert "segment" not in row["tasks"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [10, 5, 20, -1]}, "degenerate box"),
        ({"bbox": [60, 5, 20, 5]}, "outside the image of 60x40"),
        ({"bbox": [10, 5, 20]}, "four finite numbers"),
        ({"bbox": None}, "four finite numbers"),
        ({"bbox": [10, 5, float("nan"), 5]}, "four finite numbers"),
        ({"bbox": "10 5 20 30"}, "four finite numbers"),
        ({"iscrowd": [0]}, "iscrowd must be 0, 1, true or false, got a list"),
        ({"iscrowd": 2}, "iscrowd must be 0, 1, true or false, got 2"),
    ],
)
def test_a_bad_annotation_alone_is_rejected(load, changes, reason):
    loaded = load({"categories": CATEGORIES, "annotations": [annotation(id=4), annotation(**changes)]})
    row, rejected = row_of(loaded)
    (record,) = [*loaded.rejected, *rejected]
    assert reason in record["reason"]
    assert record["origin"] == "part0.json annotation 5"
    assert len(row["instances"]) == 1
    assert row["classes"] == ["person"]  # cells are no longer annotated exhaustively


def test_a_box_without_area_marks_nothing_to_find(load):
    empty = [annotation(id=4, bbox=[10, 5, 0, 30]), annotation(bbox=[0, 0, 0, 0], category_id=2)]
    row, rejected = row_of(load({"categories": CATEGORIES, "annotations": [annotation(), *empty]}))
    assert [r["rule"] for r in rejected] == ["empty_box", "empty_box"]
    assert row["classes"] == ["cell", "person"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"category_id": 99}, "unknown category id 99"), ({"category_id": [1]}, "unknown category id [1]")],
)
def test_an_object_of_unknown_class_leaves_no_class(load, changes, reason):
    loaded = load({"categories": CATEGORIES, "annotations": [annotation(id=4), annotation(**changes)]})
    row, rejected = row_of(loaded)
    assert rejected == [] and [r["reason"] for r in loaded.rejected] == [reason]
    assert (row["classes"], row["tasks"]) == ([], [])


def test_an_object_of_unknown_image_could_be_in_any(load):
    images = [IMAGE, {**IMAGE, "id": 2, "file_name": "b.jpg"}]
    annotations = [annotation(id=4), annotation(id=5, image_id=3), annotation(id=6, category_id=2)]
    loaded = load({"images": images, "categories": CATEGORIES, "annotations": annotations})
    assert [r["reason"] for r in loaded.rejected] == ["its image id 3 is not in the file"]
    classes = [image.classes(loaded.classes) for image in loaded.images]
    assert classes == [["cell", "person"], ["person"]]  # where cells are annotated, they stay
    assert "no image of it is a negative example for 'cell'" in loaded.notes[0]


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_lists_that_do_not_belong_to_the_annotations_are_refused(load, key):
    bad = [annotation(id=n, **{key: 50 + n}) for n in range(2)]
    with pytest.raises(UserError, match="2 of 3 annotations in .* the first, part0.json annotation 0: .* 50"):
        load({"categories": CATEGORIES, "annotations": [annotation(), *bad]})


VALUES = {"1": 1, "1.0": 1.0, "text": "1", "decimal text": "1.0", "blank text": " 1 "}


@pytest.mark.parametrize("listed", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("given", VALUES.values(), ids=VALUES)
def test_ids_compare_by_value(load, listed, given):
    row, rejected = row_of(load({
        "images": [{**IMAGE, "id": listed}], "categories": [{"id": listed, "name": "cell"}],
        "annotations": [annotation(image_id=given, category_id=given)],
    }))  # fmt: skip
    assert rejected == [] and len(row["instances"]) == 1


def test_ids_count_from_zero_too(load):
    row, rejected = row_of(load({
        "images": [{**IMAGE, "id": 0}], "categories": [{"id": 0, "name": "cell"}],
        "annotations": [annotation(id=0, image_id=0, category_id=0)],
    }))  # fmt: skip
    assert rejected == [] and len(row["instances"]) == 1


SQUARE = [10, 5, 30, 5, 30, 35, 10, 35]
POSE = [{"id": 1, "name": "cell", "keypoints": ["a", "b"], "skeleton": []}]
BAD_PARTS = {
    "empty polygon": ({"segmentation": [[]]}, "masks dropped"),
    "two points": ({"segmentation": [[1, 1, 2, 2]]}, "masks dropped"),
    "thin polygon": ({"segmentation": [[5, 5, 25, 5, 25, 5.3, 5, 5.3]]}, "masks dropped"),
    "far outside": ({"segmentation": [[-30, -30, -20, -30, -20, -20]]}, "masks dropped"),
    "run lengths of another size": (
        {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [2300, 100]}},
        "masks dropped",
    ),
    "empty run lengths": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [2400]}}, "masks dropped"),
    "no segmentation": ({"segmentation": "x"}, "masks dropped"),
    "stray points": ({"segmentation": [SQUARE, [30, 30, 31, 31]]}, "mask parts dropped"),
    "keypoints without names": ({"keypoints": [10, 10, 2]}, "keypoints dropped"),
}


@pytest.mark.parametrize(("changes", "change"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_bad_part_costs_that_part(load, changes, change):
    row, rejected = row_of(load({"categories": CATEGORIES, "annotations": [annotation(**changes)]}))
    assert rejected == []
    (found,) = row["instances"]
    assert found["box"] == [10, 5, 30, 35] and found["keypoints"] is None
    assert (found["mask"] is not None) == (change == "mask parts dropped")
    assert row["classes"] == ["cell", "person"]
    assert changed_by(load, annotation(**changes)) == {change: 1}


def changed_by(load, entry, categories=CATEGORIES):
    loaded = load({"categories": categories, "annotations": [entry]})
    (record,) = loaded.images
    keypoints = {c["name"]: len(c["keypoints"]) for c in loaded.categories}
    return coco.to_row(record, JPEG, keypoints, record.classes(loaded.classes), "test").changed


@pytest.mark.parametrize(
    ("values", "kept", "changed"),
    [
        ([None, None, 0, 12, 12, 2], [0, 0, 0, 12, 12, 2], {}),
        ([10, 10, 3, 12, 12, 2], [0, 0, 0, 12, 12, 2], {"keypoints dropped": 1}),
        ([10, 10, 0.9, 12, 12, 0.4], None, {"keypoints dropped": 2}),
        (["10", "10", "2", 12, None, 2], [10, 10, 2, 0, 0, 0], {"keypoints dropped": 1}),
        ([10, 10, 2], None, {"keypoints dropped": 1}),
        ([10, 10, 0, 99, 12, 2], None, {"keypoints outside the image": 1}),
    ],
)
def test_keypoints_are_dropped_one_by_one(load, values, kept, changed):
    entry = annotation(keypoints=values)
    row, rejected = row_of(load({"categories": POSE, "annotations": [entry]}))
    assert rejected == [] and row["instances"][0]["keypoints"] == kept
    assert changed_by(load, entry, POSE) == changed


def test_a_box_without_area_is_taken_from_the_mask(load):
    entry = annotation(bbox=[0, 0, 0, 0], segmentation=[SQUARE], area=3)
    row, rejected = row_of(load({"categories": CATEGORIES, "annotations": [entry]}))
    assert rejected == []
    assert (row["instances"][0]["box"], row["instances"][0]["area"]) == ([10, 5, 30, 35], 600)
    assert changed_by(load, entry) == {"boxes taken from masks": 1}


@pytest.mark.parametrize("where", ["attributes", "annotation"])
@pytest.mark.parametrize("rotation", [90, "90.0", -270])
def test_a_turned_rectangle(load, where, rotation):
    turn = {"rotation": rotation}
    entry = annotation(bbox=[10, 15, 30, 10], **({"attributes": turn} if where == "attributes" else turn))
    row, rejected = row_of(load({"categories": CATEGORIES, "annotations": [entry]}))
    assert rejected == []
    (found,) = row["instances"]
    assert found["box"] == [20, 5, 30, 35]
    assert found["area"] == 300 and found["mask"] is not None


@pytest.mark.parametrize("rotation", [0, 360, "left", None, True])
def test_a_rectangle_that_is_not_turned(load, rotation):
    entry = annotation(bbox=[10, 15, 30, 10], attributes={"rotation": rotation})
    row, _ = row_of(load({"categories": CATEGORIES, "annotations": [entry]}))
    assert (row["instances"][0]["box"], row["instances"][0]["mask"]) == ([10, 15, 40, 25], None)


def test_a_rectangle_turned_by_45_degrees_has_its_polygon_as_mask(load):
    entry = annotation(
        bbox=[20, 10, 20, 20], attributes={"rotation": 45}, segmentation=[[20, 10, 40, 10, 40, 30, 20, 30]]
    )
    row, _ = row_of(load({"categories": CATEGORIES, "annotations": [entry]}))
    (found,) = row["instances"]
    half = 10 * 2**0.5
    assert found["box"] == pytest.approx([30 - half, 20 - half, 30 + half, 20 + half], abs=1e-4)
    assert found["area"] == pytest.approx(400, abs=20)
    assert not Masks([found["mask"]], (HEIGHT, WIDTH)).to_arrays()[0, 11, 21]  # a corner of the box that is not turned


ROOT = [{"id": 0, "name": "cells", "supercategory": "none"}, {"id": 1, "name": "cell", "supercategory": "Cells"},
        {"id": 2, "name": "dog", "supercategory": "dog"}]  # fmt: skip


def test_a_root_category_without_objects_is_no_class(load):
    loaded = load({"categories": ROOT, "annotations": [annotation()]})
    assert [c["name"] for c in loaded.categories] == ["cell", "dog"]
    assert row_of(loaded)[0]["classes"] == ["cell", "dog"]
    assert "left out as no class: 'cells'" in loaded.notes[0]
    used = load({"categories": ROOT, "annotations": [annotation(), annotation(category_id=0)]})
    assert row_of(used)[0]["classes"] == ["cells", "cell", "dog"] and used.notes == []


def test_a_file_listed_under_two_ids_keeps_the_first(load):
    images = [IMAGE, {**IMAGE, "id": 2, "file_name": "./a.jpg"}]
    entries = [annotation(id=4), annotation(id=5, image_id=2, category_id=2)]
    loaded = load({"images": images, "categories": CATEGORIES, "annotations": entries})
    row, _ = row_of(loaded)
    assert (len(row["instances"]), row["classes"]) == (1, ["cell"])
    assert [(r["kind"], r["rule"]) for r in loaded.rejected] == [
        ("images", "repeated_image"),
        ("annotations", "repeated_image"),
    ]


def test_a_list_of_captions_is_several(load):
    loaded = load({"annotations": [{"id": 1, "image_id": 1, "caption": ["a cell", "", "two"]}]})
    row, rejected = row_of(loaded)
    assert rejected == []
    assert [m["turns"][-1]["content"] for m in row["messages"]] == ["a cell", "two"]


def test_crowds_alone_are_said_to_be_odd(load):
    crowds = [annotation(id=n, iscrowd=1, bbox=[n, 5, 9, 9], segmentation=[SQUARE]) for n in range(2)]
    assert "datumaro" in load({"categories": CATEGORIES, "annotations": crowds}).notes[0]
    assert load({"categories": CATEGORIES, "annotations": [*crowds, annotation(segmentation=[SQUARE])]}).notes == []


def test_numbers_and_flags_may_be_texts(load):
    image = {**IMAGE, "height": str(HEIGHT), "width": f"{WIDTH}.0"}
    entry = annotation(bbox=["10", "5", "20", "30"], iscrowd="0", area="12")
    row, rejected = row_of(load({"images": [image], "categories": CATEGORIES, "annotations": [entry]}))
    assert rejected == []
    (found,) = row["instances"]
    assert (found["box"], found["crowd"], found["area"]) == ([10, 5, 30, 35], False, 12)


def test_annotations_that_are_no_objects_are_rejected(load):
    good = [annotation(id=n, bbox=[n, 5, 9, 9]) for n in range(3)]
    loaded = load({"categories": CATEGORIES, "annotations": [None, 3, "x", *good]})
    assert [r["origin"] for r in loaded.rejected] == [f"part0.json annotation number {n}" for n in range(3)]


def test_keypoints_and_masks_of_the_same_person_are_merged_over_files(load):
    mask = [[10, 5, 30, 5, 30, 35, 10, 35]]
    objects = [annotation(category_id=2, segmentation=mask), annotation(id=6)]
    points = [
        annotation(id=77, category_id=7, bbox=[10.0, 5.0, 20.0, 30.0], keypoints=[12, 6, 2, 80, 30, 1], area=400),
        annotation(id=78, category_id=7, bbox=[1, 1, 8, 8], keypoints=[0, 0, 0, 0, 0, 0]),
    ]
    captions = [
        {"id": 1, "image_id": 9, "caption": " A person\n in a\tcell. "},
        {"id": 2, "image_id": 9, "caption": ""},
    ]
    loaded = load(
        {"categories": CATEGORIES, "annotations": objects},
        {"categories": SKELETON, "annotations": points},
        {"images": [{**IMAGE, "id": 9}], "annotations": captions},
    )
    assert (loaded.listed, loaded.merged) == (6, 1)
    assert loaded.categories[1] == {"name": "person", "keypoints": ["head", "foot"], "skeleton": [[0, 1]]}
    row, rejected = row_of(loaded)
    merged, cell, other = row["instances"]
    assert merged["mask"] is not None
    assert merged["keypoints"] == [12, 6, 2, 0, 0, 0]  # the second point lies outside
    assert merged["area"] == 400
    assert (cell["phrase"], cell["keypoints"], other["keypoints"]) == ("cell", None, None)
    assert row["messages"][0]["turns"] == [
        {"role": "user", "content": "describe the image ."},
        {"role": "assistant", "content": "A person in a cell."},
    ]
    assert [r["reason"] for r in rejected] == ["the caption is empty"]
    assert row["tasks"] == ["detect", "count", "pose", "caption"]


def test_objects_without_a_box_are_merged_by_their_outline_alone(load):
    left, right = [[1, 1, 9, 1, 9, 9]], [[20, 20, 40, 20, 40, 30]]
    boxless = [{**annotation(segmentation=outline), "bbox": None} for outline in (left, right)]
    loaded = load(
        {"categories": CATEGORIES, "annotations": boxless[:1]},
        {"categories": CATEGORIES, "annotations": boxless[::-1]},
    )
    assert (loaded.listed, loaded.merged) == (3, 1)
    row, rejected = row_of(loaded)
    assert rejected == []
    assert [round(i["box"][1]) for i in row["instances"]] == [1, 20]


@pytest.mark.parametrize("bbox", [None, [1, 2, 3], "1 2 3 4"])
def test_objects_that_tell_no_place_are_never_merged(load, bbox):
    part = {"categories": CATEGORIES, "annotations": [annotation(bbox=bbox)]}
    loaded = load(part, part)
    assert loaded.merged == 0
    assert len(row_of(loaded)[1]) == 2


def test_equal_objects_of_one_file_are_one(load):
    repeats = [annotation(), annotation(id=6), annotation(id=7, category_id=2)]
    loaded = load({"categories": CATEGORIES, "annotations": repeats})
    assert loaded.merged == 0
    row, rejected = row_of(loaded)
    assert [i["phrase"] for i in row["instances"]] == ["cell", "person"]
    assert [(r["origin"], r["rule"]) for r in rejected] == [("part0.json annotation 6", "repeated")]
    assert row["classes"] == ["cell", "person"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "missing"),
        (JPEG[:300], "cannot be read"),
        (encode_jpeg(np.zeros((WIDTH, HEIGHT, 3), np.uint8)), "say 60x40 pixels, the image has 40x60"),
    ],
)
def test_a_bad_image_rejects_itself_and_all_that_hangs_on_it(load, image, reason):
    captions = {"annotations": [{"id": 3, "image_id": 1, "caption": "a cell"}]}
    row, rejected = row_of(load({"categories": CATEGORIES, "annotations": [annotation()]}, captions), image)
    assert row is None
    origins = ["part0.json image 1", "part0.json annotation 5", "part1.json annotation 3"]
    assert [r["origin"] for r in rejected] == origins
    assert all(reason in r["reason"] for r in rejected)
    assert {r["image_id"] for r in rejected} == {"a.jpg"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid json"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 0 needs"),
        ('{"images": [3], "annotations": []}', "image 0 needs"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "a category needs"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x", "skeleton": [["x", 1]]}]}',
            "category 'x': skeleton must be pairs",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "image id 1 stands for two files",
        ),
    ],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        coco_json.load([tmp_path / "bad.json"])
    assert error.value.reason == "invalid_annotations"


def test_missing_files_and_conflicting_skeletons_are_refused(load, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        coco_json.load([tmp_path / "absent.json"])
    with pytest.raises(UserError, match="at least one"):
        coco_json.load([])
    with pytest.raises(UserError, match="other keypoints"):
        load({"categories": SKELETON}, {"categories": [{**SKELETON[0], "keypoints": ["a", "b"]}]})


def test_real_coco_annotations_agree_with_pycocotools(test_data):
    folder = test_data / "coco_photos"
    path = folder / "annotations" / "instances_train.json"
    raw = json.loads(path.read_text())
    loaded = coco_json.load([path])
    by_image = {image["file_name"]: [] for image in raw["images"]}
    names = {image["id"]: image["file_name"] for image in raw["images"]}
    for entry in raw["annotations"]:
        by_image[names[entry["image_id"]]].append(entry)
    compressed = 0
    for record in loaded.images:
        data = (folder / "images" / record.file_name).read_bytes()
        row, rejected = row_and_rejected(loaded, record, data)
        assert rejected == []
        height, width = decode(data).shape[:2]
        assert len(row["instances"]) == len(by_image[record.file_name])
        for instance, entry in zip(row["instances"], by_image[record.file_name], strict=True):
            back = Boxes(instance["box"], (height, width)).to_xywh()[0]
            assert back == pytest.approx(entry["bbox"], abs=0.02)
            expected = entry["segmentation"]
            if isinstance(expected, list):
                expected = coco_mask.merge(coco_mask.frPyObjects(expected, height, width))["counts"].decode()
            elif isinstance(expected["counts"], list):
                expected = coco_mask.frPyObjects(expected, height, width)["counts"].decode()
            else:
                compressed += 1
                expected = expected["counts"]
            assert instance["mask"]["counts"] == expected
            assert instance["crowd"] == bool(entry["iscrowd"])
            assert instance["area"] == pytest.approx(entry["area"])
    assert compressed > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"skeleton": [["x", 1]]},
        {"skeleton": [[1, 2, 3]]},
        {"skeleton": [[0, 1]]},
        {"skeleton": [[1, 3]]},
        {"skeleton": [[1, 1.5]]},
        {"skeleton": [1, 2]},
        {"skeleton": 3},
        {"keypoints": 3},
        {"keypoints": "head"},
        {"keypoints": ["head", None]},
    ],
)
def test_a_malformed_skeleton_is_refused(load, changes):
    with pytest.raises(UserError, match="category 'person': (skeleton|keypoints) must be") as error:
        load({"categories": [{**SKELETON[0], **changes}]})
    assert error.value.reason == "invalid_annotations"


def test_only_rectangles_are_turned(load):
    triangle = [10, 5, 30, 5, 10, 35]
    entry = annotation(attributes={"rotation": 90}, segmentation=[triangle])
    row, _ = row_of(load({"categories": CATEGORIES, "annotations": [entry]}))
    assert row["instances"][0]["box"] == [10, 5, 30, 35]


@pytest.mark.parametrize("bad", [{"id": 9}, {"file_name": "b.jpg"}, {"id": 9, "file_name": "b\0.jpg"}, 3,
                                 {"id": 9, "file_name": "\ud800.jpg"}, {"id": 9, "file_name": ["b.jpg"]}])  # fmt: skip
def test_an_image_that_cannot_be_named_is_rejected_alone(load, bad):
    entries = [annotation(), annotation(id=6, category_id=2)]
    loaded = load({"images": [IMAGE, bad], "categories": CATEGORIES, "annotations": entries})
    assert [(r["kind"], r["origin"]) for r in loaded.rejected] == [("images", "part0.json image number 1")]
    assert len(row_of(loaded)[0]["instances"]) == 2


@pytest.mark.parametrize(("name", "read"), [(0, "0"), (7.0, "7"), (" a  b ", "a b")])
def test_names_of_classes_may_be_numbers(load, name, read):
    loaded = load({"categories": [{"id": 1, "name": name}], "annotations": [annotation()]})
    assert [c["name"] for c in loaded.categories] == [read]


@pytest.mark.parametrize("name", [False, ["cat"], {"en": "cat"}, "", " ", "\ud800", None])
def test_names_that_are_none_are_refused(load, name):
    with pytest.raises(UserError, match="a category needs 'id' and 'name'"):
        load({"categories": [{"id": 1, "name": name}]})


def test_a_file_given_twice_is_read_once(load, tmp_path):
    part = {"categories": CATEGORIES, "annotations": [annotation(), {"id": 9, "image_id": 1, "caption": "a"}]}
    load(part)
    loaded = coco_json.load([tmp_path / "part0.json", tmp_path / "part0.json"])
    assert loaded.listed == 2 and len(row_of(loaded)[0]["messages"]) == 1


def test_a_frame_that_no_size_shows_is_counted(load):
    square = np.full((WIDTH, WIDTH, 3), 200, np.uint8)
    for tag, pixels, size, counted in (
        (3, np.full((HEIGHT, WIDTH, 3), 200, np.uint8), (HEIGHT, WIDTH), True),
        (6, square, (WIDTH, WIDTH), True),
        (6, square, (0, 0), True),
        (6, np.full((HEIGHT, WIDTH, 3), 200, np.uint8), (HEIGHT, WIDTH), False),
        (1, square, (WIDTH, WIDTH), False),
    ):
        image = IMAGE | {"height": size[0], "width": size[1]}
        loaded = load({"images": [image], "categories": CATEGORIES, "annotations": [annotation()]})
        (record,) = loaded.images
        outcome = coco.to_row(record, rotated_jpeg(pixels, tag), {}, ["cell"], "test")
        assert (ASSUMED in outcome.changed) == counted


def rotated_jpeg(pixels, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_boxes_of_fractions_are_told(load):
    fractions = [annotation(bbox=[0.1, 0.25, 0.4, 0.5]), annotation(id=6, bbox=[0, 0, 1, 1])]
    (note,) = load({"categories": CATEGORIES, "annotations": fractions}).notes
    assert "all boxes (2) lie within the first pixel" in note and "part0.json" in note
    assert load({"categories": CATEGORIES, "annotations": [*fractions, annotation(id=7)]}).notes == []
    assert load({"categories": CATEGORIES, "annotations": [annotation(bbox=[0, 0, 1, 1])]}).notes == []
    assert load({"categories": CATEGORIES, "annotations": [annotation(bbox=[])]}).notes == []


def test_a_file_without_categories_or_with_an_id_of_two_files_is_refused(load):
    with pytest.raises(UserError, match="lists no categories; add them"):
        load({"categories": [], "annotations": [annotation()]})
    twice = [IMAGE, IMAGE | {"file_name": "b.jpg"}]
    with pytest.raises(UserError, match=r"image id 1 stands for two files, 'a\.jpg' and 'b\.jpg'; give each"):
        load({"images": twice, "categories": CATEGORIES})


def test_an_object_without_an_image_could_be_where_its_class_marks_nothing(load):
    orphan, empty = annotation(image_id=9), annotation(id=6, bbox=[5, 5, 0, 0])
    others = [annotation(id=7 + n, category_id=2) for n in range(2)]
    row, _ = row_of(load({"categories": CATEGORIES, "annotations": [orphan, empty, *others]}))
    assert row["classes"] == ["person"]


def test_a_repeat_is_rejected_though_a_later_file_adds_keypoints(load):
    person = [{"id": 7, "name": "person", "keypoints": ["head", "foot"], "skeleton": [[1, 2]]}]
    twice = [annotation(category_id=7), annotation(id=6, category_id=7, bbox=["10.0", 5, 20, "30"])]
    points = annotation(category_id=7, keypoints=[12, 9, 2, 15, 20, 2])
    loaded = load({"categories": person, "annotations": twice}, {"categories": person, "annotations": [points]})
    row, rejected = row_of(loaded)
    assert [i["keypoints"] for i in row["instances"]] == [[12, 9, 2, 15, 20, 2]]
    assert [r["rule"] for r in rejected] == ["repeated"]
