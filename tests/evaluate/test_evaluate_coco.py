"""COCO's metrics from our evaluator, against published values and by hand on tiny scenes."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lumen_ray.answer import Answer
from lumen_ray.data.shards.schema import make_row
from lumen_ray.evaluate.coco import CocoEvaluator
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction

CROWDPOSE_SIGMAS = np.array([0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89, 0.79, 0.79]) / 10


def load(path):
    return json.loads(path.read_text())


def as_rle(segmentation, size):
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return segmentation
    parts = coco_mask.frPyObjects(segmentation, *size)
    rle = coco_mask.merge(parts) if isinstance(parts, list) else parts
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def to_rows(truth, box_area=None):
    """COCO ground truth as shard rows, in the order of image ids (COCOeval's order, which decides between ties)."""
    names = {c["id"]: c["name"] for c in truth["categories"]}
    rows = []
    for image in sorted(truth["images"], key=lambda i: i["id"]):
        size = (image["height"], image["width"])
        instances = []
        for a in [a for a in truth["annotations"] if a["image_id"] == image["id"]]:
            x, y, w, h = a["bbox"]
            segmentation = a.get("segmentation")
            instances.append(
                {
                    "phrase": names[a["category_id"]],
                    "box": [x, y, x + w, y + h],
                    "mask": as_rle(segmentation, size) if segmentation else None,
                    "keypoints": a.get("keypoints"),
                    "crowd": bool(a["iscrowd"]),
                    "area": a["area"] if box_area is None else box_area * w * h,
                }
            )
        rows.append(make_row(str(image["id"]), b"", size, "oracle", classes=list(names.values()), instances=instances))
    return rows


def to_answers(rows, truth, results, kind):
    """A COCO result list as engine answers: one `Prediction` per class and image."""
    names = {c["id"]: c["name"] for c in truth["categories"]}
    points = {c["name"]: c.get("keypoints", []) for c in truth["categories"]}
    answers = []
    for row in rows:
        size, predictions = (row["height"], row["width"]), []
        mine = [r for r in results if str(r["image_id"]) == row["image_id"]]
        for category, name in names.items():
            found = [r for r in mine if r["category_id"] == category]
            boxes = Boxes.from_xywh([r.get("bbox", [0, 0, 1, 1]) for r in found], size)
            prediction = Prediction(name, boxes, np.array([r["score"] for r in found]))
            if kind == "segm":
                prediction.masks = Masks([r["segmentation"] for r in found], size)
            if kind == "keypoints":
                prediction.keypoints = Keypoints([r["keypoints"] for r in found], points[name], size)
            predictions.append(prediction)
        answers.append(Answer("detect", size, predictions))
    return answers


def score(truth, results, kind, **options):
    skeletons = {c["name"]: c["keypoints"] for c in truth["categories"] if "keypoints" in c}
    rows = to_rows(truth, options.pop("box_area", None))
    evaluator = CocoEvaluator(kind, [c["name"] for c in truth["categories"]], skeletons=skeletons, **options)
    answers = to_answers(rows, truth, results, kind)
    half = len(rows) // 2
    evaluator.process(rows[:half], answers[:half])
    evaluator.process(rows[half:], answers[half:])
    return evaluator.evaluate()


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_published_lines_of_val2014(kind, test_data, capsys):
    folder = test_data / "oracle_cocoeval"
    truth = load(folder / "instances_val2014_100.json")
    results = load(folder / f"instances_val2014_fake{kind}100_results.json")
    values = score(truth, results, kind)
    expected = load(folder / "expected_pycocotools_2.0.11.json")[kind]
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert [values[n] for n in names] == pytest.approx(expected, abs=1e-6)
    per_class = [v for v in values["per_class"].values() if v is not None]
    assert np.mean(per_class) == pytest.approx(values["AP50"], abs=1e-6)
    assert capsys.readouterr().out == ""


def test_published_lines_of_keypoints(test_data):
    folder = test_data / "oracle_cocoeval"
    truth = load(folder / "keypoints" / "gt_dataset.json")
    values = score(truth, load(folder / "keypoints" / "dt_dataset.json"), "keypoints")
    names = ["AP", "AP50", "AP75", "APm", "APl", "AR20", "AR50", "AR75", "ARm", "ARl"]
    expected = load(folder / "expected_pycocotools_2.0.11.json")["keypoints_fce"]
    assert [values[n] for n in names] == pytest.approx(expected, abs=1e-6)


def test_published_ap_of_crowdpose(test_data):
    # CrowdPose takes 0.53 of the box as an object's area, and has its own 14 sigmas
    folder = test_data / "oracle_cocoeval" / "crowdpose"
    truth = load(folder / "example_crowdpose_val.json")
    results = load(folder / "example_crowdpose_preds.json")
    values = score(truth, results, "keypoints", sigmas={"person": CROWDPOSE_SIGMAS}, box_area=0.53)
    assert values["AP"] == pytest.approx(0.7877215935879303, abs=1e-6)


SIZE = (100, 100)


def instance(phrase, box, *, crowd=False, mask=None, keypoints=None):
    area = (box[2] - box[0]) * (box[3] - box[1])
    return {"phrase": phrase, "box": box, "mask": mask, "keypoints": keypoints, "crowd": crowd, "area": area}


def scene(instances, classes=("cat", "dog")):
    return make_row("a", b"", SIZE, "test", classes=list(classes), instances=instances)


def answer(**boxes):
    """`cat=[(box, score), ...]`"""
    predictions = [
        Prediction(name, Boxes([box for box, _ in found], SIZE), [s for _, s in found]) for name, found in boxes.items()
    ]
    return Answer("detect", SIZE, predictions)


def run(row, found, kind="bbox", **options):
    evaluator = CocoEvaluator(kind, ["cat", "dog"], **options)
    evaluator.process([row], [found])
    return evaluator.evaluate()


CAT, DOG = [10, 10, 40, 40], [50, 50, 90, 90]


def test_perfect_and_missed_classes():
    values = run(scene([instance("cat", CAT), instance("dog", DOG)]), answer(cat=[(CAT, 0.9)]))
    assert values["AP"] == pytest.approx(0.5)
    assert values["per_class"] == {"cat": pytest.approx(1.0), "dog": 0.0}


def test_false_positives_cost_only_when_scored_above():
    row = scene([instance("cat", CAT)])
    assert run(row, answer(cat=[(CAT, 0.9), (DOG, 0.5)]))["AP50"] == pytest.approx(1.0)
    assert run(row, answer(cat=[(CAT, 0.5), (DOG, 0.9)]))["AP50"] == pytest.approx(0.5)


def test_no_prediction_is_zero_and_no_annotation_is_none():
    row = scene([instance("cat", CAT)])
    values = run(row, answer(cat=[], dog=[]))
    assert values["AP"] == 0 and values["per_class"] == {"cat": 0.0, "dog": None}
    assert run(scene([]), answer(cat=[(CAT, 0.9)]))["AP"] is None
    assert CocoEvaluator("keypoints", ["cat"]).evaluate()["AP"] is None


def test_crowd_is_neither_hit_nor_miss():
    crowd = instance("cat", [40, 40, 100, 100], crowd=True)
    values = run(scene([instance("cat", CAT), crowd]), answer(cat=[([50, 50, 70, 70], 0.95), (CAT, 0.9)]))
    assert values["AP"] == pytest.approx(1.0)


def test_a_class_not_annotated_in_a_row_is_not_scored_there():
    row = scene([instance("cat", CAT)], classes=["cat"])
    evaluator = CocoEvaluator("bbox", ["cat", "dog"])
    evaluator.process(
        [row, scene([instance("dog", DOG)])], [answer(dog=[(DOG, 0.99)], cat=[(CAT, 1)]), answer(dog=[(DOG, 0.5)])]
    )
    assert evaluator.evaluate()["per_class"]["dog"] == pytest.approx(1.0)
    evaluator.reset()
    assert evaluator.evaluate()["AP"] is None


def test_an_instance_without_mask_is_ignored_by_mask_ap():
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 10:40, 10:40] = True
    masks[1, 55:85, 55:85] = True
    rles = Masks.from_arrays(masks)
    row = scene([instance("cat", CAT, mask=rles.rles[0]), instance("cat", DOG)])
    found = answer(cat=[(DOG, 0.9), (CAT, 0.8)])
    with pytest.raises(ValueError, match="needs predictions with masks"):
        run(row, found, "segm")
    found.predictions[0].masks = rles[[1, 0]]
    assert run(row, found, "segm")["AP"] == pytest.approx(1.0)


def test_classes_with_different_keypoints_share_one_table():
    skeletons = {"cat": ("nose", "tail"), "dog": ("nose", "left ear", "right ear")}
    cat = np.array([15, 15, 2, 35, 35, 1], float)
    dog = np.array([60, 60, 2, 70, 70, 2, 0, 0, 0], float)
    row = scene([instance("cat", CAT, keypoints=cat), instance("dog", DOG, keypoints=dog)])
    found = answer(cat=[(CAT, 0.9)], dog=[(DOG, 0.9)])
    for prediction, points in zip(found.predictions, (cat, dog + [20, 0, 0] * 3), strict=True):
        prediction.keypoints = Keypoints(points, skeletons[prediction.phrase], SIZE)
    values = run(row, found, "keypoints", skeletons=skeletons)
    assert values["per_class"] == {"cat": pytest.approx(1.0), "dog": 0.0}
    assert values["AP"] == pytest.approx(0.5)
