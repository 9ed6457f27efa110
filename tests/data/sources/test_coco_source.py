"""COCO json to rows: merging of files, and what is refused."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lumen_ray.data.images import decode
from lumen_ray.data.scenes.render import encode_jpeg
from lumen_ray.data.sources import coco, coco_json
from lumen_ray.data.sources.base import image_locations, read_first
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes

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
    written = len(outcome.row["instances"]) + len(outcome.row["messages"]) if outcome.row else 0
    assert sum(outcome.written.values()) == written
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
            "annotations": [annotation(segmentation=s, iscrowd=int(s is kinds[2])) for s in kinds],
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
        ({"bbox": [10, 5, 0, 30]}, "degenerate box"),
        ({"bbox": [10, 5, 20, -1]}, "degenerate box"),
        ({"bbox": [60, 5, 20, 5]}, "outside the image of 60x40"),
        ({"bbox": [10, 5, 20]}, "four finite numbers"),
        ({"bbox": None}, "four finite numbers"),
        ({"bbox": [10, 5, float("nan"), 5]}, "four finite numbers"),
        ({"bbox": "10 5 20 30"}, "four finite numbers"),
        ({"segmentation": {"size": [60, 40], "counts": "0"}}, "mask has size"),
        ({"segmentation": [[1, 1, 2, 2]]}, "at least 3 points"),
        ({"segmentation": [[-30, -30, -20, -30, -20, -20]]}, "covers no pixel"),
        ({"keypoints": [1, 2, 2]}, "for each of 0 keypoints"),
        ({"category_id": 99}, "unknown category id 99"),
        ({"category_id": [1]}, "unknown category id"),
        ({"image_id": 2}, "its image is not in the file"),
    ],
)
def test_a_bad_annotation_alone_is_rejected(load, changes, reason):
    loaded = load({"categories": CATEGORIES, "annotations": [annotation(id=4), annotation(**changes)]})
    row, rejected = row_of(loaded)
    (record,) = [*loaded.rejected, *rejected]
    assert reason in record["reason"]
    assert record["origin"] == "part0.json annotation 5"
    assert len(row["instances"]) == 1
    known = changes.get("category_id", 1) == 1 and changes.get("image_id", 1) == 1
    assert ("cell" in row["classes"]) == (not known)  # no longer annotated exhaustively
    assert "person" in row["classes"]


def test_annotations_that_are_no_objects_are_rejected(load):
    loaded = load({"categories": CATEGORIES, "annotations": [None, 3, "x"]})
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


def test_equal_objects_of_one_file_stay_two(load):
    loaded = load({"categories": CATEGORIES, "annotations": [annotation(), annotation(id=6)]})
    assert loaded.merged == 0
    assert len(row_of(loaded)[0]["instances"]) == 2


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
    assert [r["origin"] for r in rejected] == ["part0.json", "part0.json annotation 5", "part1.json annotation 3"]
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


def test_images_are_found_by_bare_name_too(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jpg").write_bytes(b"b")
    (tmp_path / "a.jpg").write_bytes(b"a")

    def find(name):
        return read_first(*image_locations(str(tmp_path), name))

    assert find("sub/b.jpg") == b"b"
    assert find("/home/someone/a.jpg") == b"a"
    assert find("C:\\photos\\a.jpg") == b"a"
    assert find("c.jpg") is None
    assert find("sub") is None
    assert find("x" * 5000) is None


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
