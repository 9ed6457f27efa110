"""Referring expressions: refs and their COCO objects, plain records, and what is refused."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from support.language_fakes import damaged, prepared, write_photos
from support.source_fakes import HEIGHT, WIDTH
from support.tiny_models import scene_batch

from lumen_ray.data.sources.refer import ReferSource, load_refs
from lumen_ray.errors import UserError

NAMES = [f"COCO_train2014_{n:012d}.jpg" for n in range(3)]
SQUARE = [[5, 5, 25, 5, 25, 25, 5, 25]]
INSTANCES = {
    "images": [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(NAMES)],
    "annotations": [
        {"id": 10, "image_id": 0, "category_id": 1, "bbox": [5, 5, 20, 20], "segmentation": SQUARE},
        {"id": 11, "image_id": 0, "category_id": 1, "bbox": [30, 5, 20, 20], "segmentation": []},
        {"id": 12, "image_id": 1, "category_id": 2, "bbox": [50, 30, 20, 20]},
        {"id": 13, "image_id": 1, "category_id": 2, "bbox": [1, 1, 0, 5]},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
}


def ref(image, ann, *sentences, split="train", **more):
    listed = [{"sent": s, "raw": s.upper(), "tokens": s.split(), "sent_id": n} for n, s in enumerate(sentences)]
    return {"ref_id": 7, "image_id": image, "ann_id": ann, "sentences": listed, "split": split, **more}


@pytest.fixture
def make(tmp_path):
    """A source over refs, written as json, jsonl or a pickle as Python 2 wrote them."""
    images = write_photos(tmp_path / "images", NAMES)

    def write(refs, name="refs.json", instances=INSTANCES, **changes):
        path = tmp_path / name
        if name.endswith(".p"):
            path.write_bytes(pickle.dumps(refs, protocol=2))
        elif name.endswith(".jsonl"):
            path.write_text("\n".join(json.dumps(r) for r in refs))
        else:
            path.write_text(json.dumps(refs))
        if instances is not None:
            (tmp_path / "instances.json").write_text(json.dumps(instances))
            changes["instances"] = str(tmp_path / "instances.json")
        return ReferSource([str(path)], str(images), **changes)

    return write


@pytest.mark.parametrize("name", ["refs(unc).p", "grefs(unc).json"])
def test_one_several_and_no_objects(make, name):
    refs = [
        ref(0, 10, "the left man", "guy  on\nleft"),
        ref(0, [10, 11], "both men"),
        ref(0, [-1], "a cat", no_target=True),
        ref(1, 12, "the dog"),
    ]
    rows, rejected, counts = prepared(make(refs, name))
    assert rejected == []
    assert counts == {
        "images": {"in": 2, "written": 2, "rejected": 0},
        "expressions": {"in": 5, "written": 5, "rejected": 0},
    }
    men, dog = rows
    assert (men["image_id"], men["tasks"], men["classes"]) == (NAMES[0], ["refer"], [])
    assert [(p["phrase"], p["instances"]) for p in men["phrases"]] == [
        ("the left man", [0]), ("guy on left", [0]), ("both men", [0, 1]), ("a cat", []),
    ]  # fmt: skip
    assert [i["box"] for i in men["instances"]] == [[5, 5, 25, 25], [30, 5, 50, 25]]
    expected = coco_mask.merge(coco_mask.frPyObjects(SQUARE, HEIGHT, WIDTH))["counts"].decode()
    assert men["instances"][0]["mask"] == {"size": [HEIGHT, WIDTH], "counts": expected}
    assert men["instances"][1]["mask"] is None
    assert (dog["instances"][0]["phrase"], dog["instances"][0]["box"]) == ("dog", [50, 30, 60, 40])  # clipped


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ref(1, 13, "x"), "degenerate box"),
        (ref(1, 99, "x"), "annotation 99 is not in the instances file"),
        (ref(1, [12, 13], "x"), "degenerate box"),
        (ref(1, 10, "x"), "belongs to another image"),
        (ref(9, 10, "x"), "its image 9 is not in the instances file"),
        (ref(1, 12, "x", no_target=True), "marked no_target but refers to annotations"),
        (ref(1, None, "x"), "refers to no annotation"),
        (ref(1, 12, "find [GRD] it"), "reserved token [GRD]"),
        (ref(1, 12, " "), "is empty"),
        (ref(1, 12), "no expression"),
        (ref(1, 12, "half \ud800"), "not valid UTF-8"),
        ({"ref_id": 3}, "no expression"),
        (17, "must be a mapping"),
    ],
)
def test_a_bad_expression_alone_is_rejected(make, bad, reason):
    rows, rejected, counts = prepared(make([ref(1, 12, "the dog"), bad]))
    (record,) = rejected
    assert record["kind"] == "expressions"
    assert reason in record["reason"]
    assert record["origin"] == "refs.json record 1"
    assert [p["phrase"] for p in rows[0]["phrases"]] == ["the dog"]
    assert len(rows[0]["instances"]) == 1  # objects that only a rejected expression names are not stored
    assert counts["expressions"] == {"in": 2, "written": 1, "rejected": 1}


def test_objects_of_rejected_expressions_leave_no_gap(make):
    instances = json.loads(json.dumps(INSTANCES))
    instances["annotations"].append({"id": 14, "image_id": 1, "category_id": 2, "bbox": [2, 3, 4, 5]})
    rows, rejected, _ = prepared(make([ref(1, [12, 13], "x"), ref(1, 14, "dog")], instances=instances))
    assert len(rejected) == 1
    assert [i["box"] for i in rows[0]["instances"]] == [[2, 3, 6, 8]]
    assert rows[0]["phrases"][0]["instances"] == [0]


def test_an_image_with_no_usable_expression_is_rejected(make):
    rows, rejected, counts = prepared(make([ref(0, 10, "man"), ref(1, 13, "x", "y")]))
    assert len(rows) == 1
    assert counts["images"] == {"in": 2, "written": 1, "rejected": 1}
    assert "none of its 2 expressions" in rejected[0]["reason"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "size"])
def test_a_bad_image_takes_its_expressions_along(make, tmp_path, damage):
    instances = json.loads(json.dumps(INSTANCES))
    source = make([ref(0, 10, "man", "guy"), ref(1, 12, "dog")])
    path = tmp_path / "images" / NAMES[0]
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    else:
        instances["images"][0]["height"] = 41
        (tmp_path / "instances.json").write_text(json.dumps(instances))
    rows, rejected, counts = prepared(source)
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert [r["kind"] for r in rejected] == ["images", "expressions", "expressions"]
    assert {"missing": "missing", "truncated": "cannot be read", "size": "size mismatch"}[damage] in rejected[0][
        "reason"
    ]


def test_only_the_requested_split(make):
    refs = [ref(0, 10, "man"), ref(1, 12, "dog", split="testA"), {**ref(1, 12, "dog"), "split": None}]
    rows, rejected, counts = prepared(make(refs, split="testA"))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert counts["expressions"]["in"] == 2
    assert rejected[0]["reason"] == "it names no split"
    with pytest.raises(UserError, match="no record is of split 'val'; splits: testA, train"):
        make(refs, split="val").read_listing()


PLAIN = [
    {"image": NAMES[0], "expression": "left", "bbox": [5, 5, 25, 25], "height": HEIGHT, "width": WIDTH},
    {"img_path": NAMES[0], "sentences": ["two", "both"], "bboxes": [[5, 5, 25, 25], [30, 5, 50, 25]]},
    {"file_name": NAMES[1], "sent": "masked", "segmentation": SQUARE, "category": "dog"},
    {"image": NAMES[1], "expression": "nothing", "no_target": True},
    {"image": NAMES[2], "expression": "nothing either", "bboxes": []},
]


@pytest.mark.parametrize("name", ["plain.json", "plain.jsonl"])
def test_plain_records(make, name):
    rows, rejected, counts = prepared(make(PLAIN, name, instances=None))
    assert rejected == []
    assert counts["expressions"]["written"] == 6
    assert [[(p["phrase"], p["instances"]) for p in row["phrases"]] for row in rows] == [
        [("left", [0]), ("two", [0, 1]), ("both", [0, 1])],
        [("masked", [0]), ("nothing", [])],
        [("nothing either", [])],
    ]
    assert [i["phrase"] for i in rows[1]["instances"]] == ["dog"]
    assert rows[1]["instances"][0]["box"] == [5, 5, 25, 25]


@pytest.mark.parametrize(
    ("box_format", "box"),
    [("xyxy", [15, 10, 30, 20]), ("xywh", [15, 10, 15, 10]), ("relative", [0.25, 0.25, 0.5, 0.5])],
)
def test_box_formats(make, box_format, box):
    record = {"image": NAMES[0], "expression": "it", "bbox": box}
    rows, _, _ = prepared(make([record], instances=None, box_format=box_format))
    assert rows[0]["instances"][0]["box"] == [15, 10, 30, 20]


def test_a_pickle_cannot_run_code(make, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "refs(evil).p"
    for payload in ([Evil()], [{"image_id": Evil()}], np.zeros(3)):
        path.write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match="refused: it contains an object of") as error:
            load_refs(str(path))
        assert error.value.reason == "unsafe_pickle"
    assert not (tmp_path / "owned").exists()


@given(cut=st.integers(0, 200), flip=st.integers(0, 199), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_pickle_is_reported(tmp_path, cut, flip, value):
    data = bytearray(pickle.dumps([ref(0, 10, "the left man")], protocol=2)[: 200 - cut])
    if flip < len(data):
        data[flip] = value
    (tmp_path / "refs.p").write_bytes(bytes(data))
    try:
        load_refs(str(tmp_path / "refs.p"))
    except UserError as error:
        assert error.reason in ("invalid_annotations", "unsafe_pickle")


def test_files_that_cannot_work_are_refused(make, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    images = str(tmp_path / "images")
    for make_source, message in (
        (lambda: make({"refs": 3}), "must contain a list of records"),
        (lambda: make([], instances={"images": []}), "needs the lists"),
        (lambda: make(PLAIN, instances=None, box_format="yxyx"), "box format 'yxyx' is not one of: xyxy"),
        (lambda: make([ref(0, 10, "x")], "refs.p", instances=None), "give --instances"),
        (lambda: ReferSource([str(tmp_path / "absent.json")], images), "does not exist"),
        (lambda: ReferSource([str(tmp_path / "broken.json")], images), "not valid json"),
        (lambda: ReferSource([str(tmp_path / "broken.json")], str(tmp_path / "absent")), "image folder"),
    ):
        with pytest.raises(UserError, match=message):
            make_source().read_listing()


REFS = [ref(0, 10, "left"), ref(0, [10, 11], "both"), ref(1, [-1], "none", no_target=True), ref(1, 12, "a dog")]


@pytest.mark.parametrize("kind", ["refs", "instances", "plain"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_records_never_stop_the_job(make, kind, data):
    """Counts add up, the valid expression of a separate image survives, and all rows written can be trained."""
    good = ref(2, [-1], "sound", no_target=True)
    if kind == "plain":
        good = {"image": NAMES[2], "expression": "sound", "no_target": True}
        source = make([*data.draw(damaged(PLAIN[:-1])), good], "refs.jsonl", instances=None)
    elif kind == "refs":
        source = make([*data.draw(damaged(REFS)), good])
    else:
        changed = {**INSTANCES, "annotations": data.draw(damaged(INSTANCES["annotations"]))}
        source = make([*REFS, good], instances=changed)
    rows, _, _ = prepared(source)
    assert "sound" in [p["phrase"] for row in rows for p in row["phrases"]]
    scene_batch(rows, ("refer",))


def test_real_photos(test_data, tmp_path):
    """Objects of real annotations as referring expressions, in RefCOCO's own files."""
    folder = test_data / "coco_photos"
    path = folder / "annotations" / "instances_train.json"
    annotations = [a for a in json.loads(path.read_text())["annotations"] if not a["iscrowd"]]
    refs = [ref(a["image_id"], a["id"], f"object {a['id']}") for a in annotations]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol=2))
    rows, rejected, counts = prepared(ReferSource([str(tmp_path / "refs.p")], str(folder / "images"), str(path)))
    assert rejected == []
    assert counts["expressions"]["written"] == len(refs)
    boxes = {a["id"]: a["bbox"] for a in annotations}
    for row in rows:
        for phrase in row["phrases"]:
            x, y, w, h = boxes[int(phrase["phrase"].split()[1])]
            (index,) = phrase["instances"]
            assert row["instances"][index]["box"] == pytest.approx([x, y, x + w, y + h], abs=0.02)
            assert row["instances"][index]["mask"] is not None


def test_ids_compare_by_value_and_flags_are_strict(make):
    refs = [ref("0", 10.0, "a"), ref(0.0, "11", "b"), {**ref(0, "-1", "none"), "no_target": "true"}]
    rows, rejected, _ = prepared(make(refs))
    assert rejected == []
    assert {p["phrase"]: len(p["instances"]) for p in rows[0]["phrases"]} == {"a": 1, "b": 1, "none": 0}
    _, rejected, _ = prepared(make([ref(0, 10, "a"), {**ref(0, -1, "b"), "no_target": "maybe"}]))
    assert rejected[0]["rule"] == "invalid_flag"


def test_ids_that_stand_for_two_things_are_not_guessed(make):
    twice = {
        **INSTANCES,
        "annotations": [*INSTANCES["annotations"], {**INSTANCES["annotations"][0], "bbox": [1, 1, 9, 9]}],
    }
    _, rejected, _ = prepared(make([ref(0, 10, "a"), ref(0, 11, "b")], instances=twice))
    assert [(r["rule"], r["reason"]) for r in rejected] == [
        ("unknown_annotation", "annotation 10 stands for several annotations")
    ]
    images = [*INSTANCES["images"], {"id": 9, "file_name": f"./{NAMES[0]}"}]
    entries = [*INSTANCES["annotations"], {"id": 20, "image_id": 9, "category_id": 1, "bbox": [5, 5, 20, 20]}]
    both = {**INSTANCES, "images": images, "annotations": entries}
    rows, rejected, _ = prepared(make([ref(0, 11, "a"), ref(9, 20, "b")], instances=both))
    assert [p["phrase"] for p in rows[0]["phrases"]] == ["a"]
    assert rejected[0]["rule"] == "repeated_image"


def test_a_bad_mask_leaves_the_box_and_rotation_is_read(make):
    entries = [{**INSTANCES["annotations"][0], "segmentation": [[1, 2]]},
               {**INSTANCES["annotations"][1], "bbox": [10, 15, 30, 10], "attributes": {"rotation": 90}}]  # fmt: skip
    rows, rejected, _ = prepared(
        make([ref(0, 10, "a"), ref(0, 11, "b")], instances={**INSTANCES, "annotations": entries})
    )
    assert rejected == []
    assert [(i["box"], i["mask"] is None) for i in rows[0]["instances"]] == [
        ([5, 5, 25, 25], True), ([20, 5, 30, 35], False),
    ]  # fmt: skip


def test_no_expression_lands_on_another_sets_picture(make):
    records = [{"image": f"{s}/{NAMES[0]}", "expression": s, "bbox": [1, 1, 9, 9]} for s in ("gqa", "vg")]
    records.append({"image": NAMES[1], "expression": "sound", "bbox": [1, 1, 9, 9]})
    rows, rejected, _ = prepared(make(records, instances=None))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert {r["rule"] for r in rejected} == {"ambiguous_image", "image_rejected"}


def test_a_bad_box_beside_a_good_mask_and_equal_objects(make):
    records = [{"image": NAMES[0], "expression": "a", "bbox": [5, None, 20, 20], "segmentation": SQUARE},
               {"image": NAMES[0], "expression": "b", "bbox": ["5", 5.0, 25, "25"]},
               {"image": NAMES[0], "expression": "c", "bbox": [5, 5, 25, 25]}]  # fmt: skip
    rows, rejected, _ = prepared(make(records, instances=None))
    assert rejected == []
    assert [i["box"] for i in rows[0]["instances"]] == [[5, 5, 25, 25]] * 2
    assert [p["instances"] for p in rows[0]["phrases"]] == [[0], [1], [1]]


def test_ids_under_either_key_and_a_file_given_twice(make):
    source = make([{**ref(0, None, "a"), "ann_ids": [10, 11]}])
    source.refs = source.refs * 2
    rows, rejected, counts = prepared(source)
    assert rejected == [] and counts["expressions"]["in"] == 1
    assert len(rows[0]["phrases"][0]["instances"]) == 2


def test_one_box_that_was_not_drawn_is_not_no_object(make):
    records = [{"image": NAMES[0], "expression": "a", "bbox": []},
               {"image": NAMES[0], "expression": "b", "boxes": []},
               {"image": NAMES[0], "expression": "c", "bbox": [1, 1, 9, 9]}]  # fmt: skip
    rows, rejected, _ = prepared(make(records, instances=None))
    assert [r["rule"] for r in rejected] == ["missing_box"]
    assert [(p["phrase"], p["instances"]) for p in rows[0]["phrases"]] == [("b", []), ("c", [0])]


def test_boxes_of_fractions_are_told(make):
    records = [{"image": NAMES[0], "expression": "a", "bbox": [0.1, 0.25, 0.5, 0.75]}]
    (note,) = make(records, instances=None).read_listing().notes
    assert "--box-format relative" in note
    assert make(records, instances=None, box_format="relative").read_listing().notes == []


def test_refs_without_their_coco_file_ask_for_it(make):
    records = [{"ref_id": 1, "ann_id": 10, "image_id": 1, "sentences": [{"sent": "a cell"}]}]
    _, rejected, _ = prepared(
        make([*records, {"image": NAMES[0], "expression": "b", "bbox": [1, 1, 9, 9]}], instances=None)
    )
    assert [r["rule"] for r in rejected if r["kind"] == "expressions"] == ["missing_instances"]


def test_an_image_that_no_ref_is_about_keeps_its_file(make):
    """`images/<name>` is cam1's or cam2's picture: which one is not known."""
    images = [{"id": n, "file_name": f"cam{n}/{NAMES[0]}", "height": 40, "width": 60} for n in (1, 2)]
    boxes = [{"id": 10 * n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in (1, 2)]
    instances = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    sound = {"id": 3, "file_name": NAMES[1]}
    instances["images"].append(sound)
    instances["annotations"].append({"id": 30, "image_id": 3, "category_id": 1, "bbox": [1, 1, 9, 9]})
    rows, rejected, _ = prepared(make([ref(2, 20, "a"), ref(3, 30, "b")], instances=instances))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert "ambiguous_image" in {r["rule"] for r in rejected}


def test_an_object_given_with_a_bad_box_and_without_one_is_the_same(make):
    records = [{"image": NAMES[0], "expression": "a", "segmentation": SQUARE, "bbox": [1, 2, "x", 4]},
               {"image": NAMES[0], "expression": "b", "segmentation": SQUARE},
               {"image": NAMES[0], "expression": "c", "segmentation": SQUARE, "bbox": 17}]  # fmt: skip
    rows, rejected, _ = prepared(make(records, instances=None))
    assert [r["rule"] for r in rejected] == ["invalid_box"]
    assert len(rows[0]["instances"]) == 1 and [p["instances"] for p in rows[0]["phrases"]] == [[0], [0]]


def test_the_image_of_a_rejected_record_is_no_other_records(make):
    records = [{"image": f"cam1/{NAMES[0]}", "expression": "a", "bbox": [1, 1, 9, 9]},
               {"image": f"cam2/{NAMES[0]}", "expression": "b", "bbox": 17},
               {"image": NAMES[1], "expression": "c", "bbox": [1, 1, 9, 9]}]  # fmt: skip
    rows, rejected, _ = prepared(make(records, instances=None))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
    assert "ambiguous_image" in {r["rule"] for r in rejected}


def test_the_image_of_another_split_is_no_other_records(make):
    records = [{"image": f"cam{n}/{NAMES[0]}", "expression": "a", "bbox": [1, 1, 9, 9], "split": split}
               for n, split in ((1, "train"), (2, "val"))]  # fmt: skip
    records.append({"image": NAMES[1], "expression": "c", "bbox": [1, 1, 9, 9], "split": "train"})
    rows, _, _ = prepared(make(records, instances=None, split="train"))
    assert [row["image_id"] for row in rows] == [NAMES[1]]
