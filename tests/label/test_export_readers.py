"""Exports in the libraries that they are for, where they are installed: as many objects, boxes within half a pixel,
masks with an IoU of 0.98."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from support import export_labels as made

from lumen_ray import export_labels
from lumen_ray.label.exporters.registry import EXPORTERS

IDS = {"a_x_y": 0, "b_x_y": 1, "b_frame_001": 2, "B_X_Y_2": 3, "nothing-ü": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The label folder with an export in every format."""
    root = tmp_path_factory.mktemp("readers")
    labels = made.write_labels(root / "labels", photos=made.write_photos(root / "photos"))
    export_labels(labels, list(EXPORTERS))
    return labels


def image_of(stem):
    """(id, (height, width)) of an exported file."""
    return made.LABELLED[IDS[stem]]


def wanted(stem, task):
    image_id, size = image_of(stem)
    return [r for r in made.records(image_id, "", size) if r["task"] == task and r["box"]]


def agrees(stem, task, boxes, masks=None):
    """Boxes (xyxy) and masks that a reader gives for an image, in the order of the labels."""
    rows = wanted(stem, task)
    assert len(boxes) == len(rows)
    assert not rows or np.abs(np.subtract(boxes, [row["box"] for row in rows])).max() <= 0.5
    if masks is not None and rows:
        for found, truth in zip(masks, made.masks(image_of(stem)[1]), strict=True):
            found = np.asarray(found, bool)
            assert (found & truth).sum() >= 0.98 * (found | truth).sum()
    return len(rows)


def xyxy(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def test_supervision(root):
    supervision = pytest.importorskip("supervision")
    photos = str(root.parent / "photos")
    path = str(root / "coco" / "segment.json")
    dataset = supervision.DetectionDataset.from_coco(photos, path, force_masks=True)
    stems = {made.LABELLED[k][0]: stem for stem, k in IDS.items()}
    found = [agrees(stems[os.path.relpath(p, photos)], "segment", d.xyxy, d.mask) for p, _, d in dataset]
    assert sum(found) == 8
    folder = root / "voc" / "detect"
    dataset = supervision.DetectionDataset.from_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))
    assert sum(agrees(Path(p).stem, "detect", d.xyxy) for p, _, d in dataset) == 8
    folder = root / "yolo-detect" / "detect"
    paths = [str(folder / name) for name in ("images", "labels", "data.yaml")]
    dataset = supervision.DetectionDataset.from_yolo(*paths)
    assert sum(agrees(Path(p).stem, "detect", d.xyxy) for p, _, d in dataset) == 8


@pytest.mark.parametrize(
    ("name", "task"), [("yolo-detect", "detect"), ("yolo-segment", "segment"), ("yolo-pose", "pose")]
)
def test_ultralytics(root, name, task):
    utils = pytest.importorskip("ultralytics.data.utils")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.utils import DEFAULT_CFG

    data = utils.check_det_dataset(str(root / name / task / "data.yaml"))
    dataset = YOLODataset(img_path=data["train"], data=data, task=task, imgsz=64, augment=False, hyp=DEFAULT_CFG)
    number = 0
    for label in dataset.labels:
        stem = Path(label["im_file"]).stem
        height, width = label["shape"]
        assert (height, width) == image_of(stem)[1]
        order = np.argsort(label["cls"].ravel(), kind="stable")
        cx, cy, w, h = (label["bboxes"][order] * [width, height, width, height]).T
        boxes = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=1)
        segments = [label["segments"][k] * [width, height] for k in order] if task == "segment" else []
        masks = [utils.polygon2mask((height, width), [s.reshape(-1)]) for s in segments]
        number += agrees(stem, task, boxes, masks if task == "segment" else None)
        if task == "pose" and len(boxes):
            assert np.allclose(label["keypoints"][0] * [width, height, 1], [[4, 5.5, 2], [15, 6, 2], [0, 0, 0]])
    assert len(dataset.labels) == 5 and number == (4 if task == "pose" else 8)


def check_sample(stem, sample):
    agrees(stem, "detect", [xyxy(b) for b in sample["detect"]["bbox"]])
    masks = [coco_mask.decode(rle) for rle in sample["segment"]["segmentation"]]
    agrees(stem, "segment", [xyxy(b) for b in sample["segment"]["bbox"]], masks)
    assert sample["caption"].endswith(image_of(stem)[0]) and len(sample["vqa"]["answer"]) == 2


def test_webdataset(root):
    webdataset = pytest.importorskip("webdataset")
    tars = str(root / "webdataset" / "labels-00001.tar")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == list(IDS)
    for sample in samples:
        assert sample["png"].shape[:2] == image_of(sample["__key__"])[1]
        check_sample(sample["__key__"], sample["json"])


def test_datasets(root, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = str(root / "imagefolder")
    table = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=str(tmp_path))
    assert len(table) == 5
    stems = {made.LABELLED[k][0]: stem for stem, k in IDS.items()}
    for row in table:
        assert row["image"].size[::-1] == image_of(stems[row["image_id"]])[1]
        check_sample(stems[row["image_id"]], row)
    tars = str(root / "webdataset" / "*.tar")
    samples = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path))
    for sample in samples:
        assert sample["png"].size[::-1] == image_of(sample["__key__"])[1]
        check_sample(sample["__key__"], sample["json"])
    assert len(samples) == 5


def test_datasets_after_empty_samples(tmp_path):
    """Neither library minds samples without instances in front, in more than the first tar's first five."""
    datasets = pytest.importorskip("datasets")
    answers = [*[()] * 7, ("detect",), ("segment",)]
    folder = made.write_sparse_labels(tmp_path, answers, ("detect", "segment"))
    export_labels(folder, ["imagefolder", "webdataset"])
    for name in ("imagefolder", "webdataset"):
        rows = datasets.load_dataset(
            name, data_dir=str(folder / name), split="train", cache_dir=str(tmp_path / "cache")
        )
        rows = [row.get("json") or row for row in rows]
        found = {row["image_id"]: [len(row[task]["bbox"]) for task in ("detect", "segment")] for row in rows}
        assert len(found) == 9 and found["7.png"] == [2, 0] and found["8.png"] == [0, 2] and found["0.png"] == [0, 0]


@pytest.mark.parametrize(
    ("task", "kind"), [("detect", "detections"), ("segment", "segmentations"), ("pose", "keypoints")]
)
def test_fiftyone(root, task, kind):
    coco = pytest.importorskip("fiftyone.utils.coco")
    importer = coco.COCODetectionDatasetImporter(dataset_dir=str(root / "fiftyone" / task), label_types=[kind])
    importer.setup()
    number = 0
    for path, metadata, label in importer:
        stem = Path(path).stem
        height, width = image_of(stem)[1]
        assert os.path.isfile(path) and (metadata.height, metadata.width) == (height, width)
        if kind == "keypoints":
            found = label.keypoints if label else []
            assert all(np.isnan(k.points[2]).all() and k.visible == [2, 2, 0] for k in found)
            number += len(found)
            continue
        found = label.detections if label else []
        boxes = [xyxy(np.multiply(d.bounding_box, [width, height, width, height])) for d in found]
        masks = []
        for detection, (x1, y1, _, _) in zip(found, boxes, strict=True):
            mask = np.zeros((height, width), bool)
            if kind == "segmentations":
                h, w = detection.mask.shape
                mask[round(y1) : round(y1) + h, round(x1) : round(x1) + w] = detection.mask
            masks.append(mask)
        number += agrees(stem, task, boxes, masks if kind == "segmentations" else None)
        assert [d.confidence for d in found] == [row["score"] for row in wanted(stem, task)]
    assert number == (4 if task == "pose" else 8)


def test_datumaro(root, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    dataset = datumaro.Dataset.import_from(str(root / "datumaro"), "datumaro")
    (tmp_path / "annotations.xml").write_bytes((root / "cvat" / "annotations.xml").read_bytes())
    (tmp_path / "images").symlink_to(root.parent / "photos")
    cvat = datumaro.Dataset.import_from(str(tmp_path), "cvat")
    by_path = {os.path.splitext(made.LABELLED[k][0])[0]: stem for stem, k in IDS.items()}
    for found, stem_of in ((dataset, lambda item: item.id), (cvat, lambda item: by_path[item.id])):
        number = 0
        for item in found:
            annotations = {}
            for annotation in item.annotations:
                key = annotation.attributes.get("task"), annotation.type.name
                annotations.setdefault(key, []).append(annotation)
            masks = annotations.get(("segment", "mask"), [])
            number += agrees(stem_of(item), "detect", [a.points for a in annotations.get(("detect", "bbox"), [])])
            agrees(stem_of(item), "pose", [a.points for a in annotations.get(("pose", "bbox"), [])])
            boxes = [xyxy(mask.get_bbox()) for mask in masks]
            number += agrees(stem_of(item), "segment", boxes, [mask.image for mask in masks])
        assert number == 16
    voc = datumaro.Dataset.import_from(str(root / "voc" / "detect"), "voc")
    assert sum(len(item.annotations) for item in voc) == 8


def test_datumaro_reads_panoptic(root, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "panoptic_default.json").symlink_to(root / "coco-panoptic" / "segment.json")
    (tmp_path / "annotations" / "panoptic_default").symlink_to(root / "coco-panoptic" / "segment")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "default").symlink_to(root.parent / "photos")
    stems = {os.path.splitext(made.LABELLED[k][0])[0]: stem for stem, k in IDS.items()}
    number = 0
    for item in datumaro.Dataset.import_from(str(tmp_path), "coco_panoptic"):
        boxes = [xyxy(mask.get_bbox()) for mask in item.annotations]
        number += agrees(stems[item.id], "segment", boxes, [mask.image for mask in item.annotations])
    assert number == 8


def test_panoptic_quality(root):
    """Of a panoptic export against itself, as panopticapi computes it."""
    panoptic = pytest.importorskip("hotcoco.panoptic")
    path = str(root / "coco-panoptic" / "segment.json")
    result = panoptic.pq_compute(path, path)
    assert result["Things"]["pq"] == 1 and result["Things"]["n"] == 2 and result["Stuff"]["n"] == 0


def test_label_studio(root):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((root / "labelstudio" / "labeling_config.xml").read_text())
    for task, stem in zip(json.loads((root / "labelstudio" / "tasks.json").read_text()), IDS, strict=True):
        height, width = image_of(stem)[1]
        assert interface.validate_prediction(task["predictions"][0])
        results = [r for r in task["predictions"][0]["result"] if r["from_name"] == "segment"]
        decoded = [np.reshape(brush.decode_rle(r["value"]["rle"]), (height, width, 4)) for r in results]
        agrees(stem, "segment", [row["box"] for row in wanted(stem, "segment")], [d[..., 3] for d in decoded])
        assert len(results) == len(wanted(stem, "segment"))


def test_labelme(root):
    label_file = pytest.importorskip("labelme._label_file")
    for stem in IDS:
        height, width = image_of(stem)[1]
        shapes = label_file.read_label_file(str(root / "labelme" / f"{stem}.json")).shapes
        rectangles = [s for s in shapes if s["shape_type"] == "rectangle" and s["other_data"]["task"] == "detect"]
        agrees(stem, "detect", [sum(s["points"], []) for s in rectangles])
        masks = []
        for shape in shapes:
            if shape["shape_type"] == "mask":
                (x1, y1), (x2, y2) = shape["points"]
                mask = np.zeros((height, width), bool)
                mask[y1 : y2 + 1, x1 : x2 + 1] = shape["mask"]
                masks.append(mask)
        agrees(stem, "segment", [row["box"] for row in wanted(stem, "segment")], masks)
        assert len(masks) == len(wanted(stem, "segment"))
