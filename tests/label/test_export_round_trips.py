"""Labels that are exported and prepared as training data come back: COCO, YOLO and VOC, with this package's readers."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import export_labels as made

from lumen_ray import export_labels, prepare
from lumen_ray.data.shards.shards import read_rows
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.structures import Masks

NAMES = ("one.png", "two.png")
CLASSES = ("a", "b c")


@st.composite
def corpora(draw):
    """(height, width) and instances of each of two images: class, and corner and sides in quarters of pixels."""
    found = []
    for _ in NAMES:
        height, width = draw(st.integers(12, 40)), draw(st.integers(12, 40))
        corners = st.tuples(st.integers(0, 4 * width - 8), st.integers(0, 4 * height - 8))
        sides = st.tuples(st.integers(8, 4 * width), st.integers(8, 4 * height))
        instances = st.tuples(st.sampled_from(CLASSES), corners, sides)
        found.append(((height, width), draw(st.lists(instances, max_size=4, unique_by=lambda i: i[1]))))
    return found


def rows_of(corpus):
    """The label rows of an image, by its name; the box of task segment is that of the mask."""

    def rows(image_id, path, size):
        base = dict.fromkeys(LABEL_SCHEMA.names) | {"image_id": image_id, "path": path}
        base |= {"height": size[0], "width": size[1], "provenance": ""}
        found = []
        for phrase, (x, y), (w, h) in corpus[NAMES.index(image_id)][1]:
            x1, y1, x2, y2 = x / 4, y / 4, min((x + w) / 4, size[1]), min((y + h) / 4, size[0])
            one = base | {"phrase": phrase, "score": 0.5}
            found.append(one | {"task": "detect", "box": [x1, y1, x2, y2]})
            mask = np.zeros(size, bool)
            mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
            mask[int(y1) + 1 : int(y1) + 2, int(x1) + 1 : int(x1) + 2] = False  # a hole, or a bite
            ys, xs = np.nonzero(mask)
            box = [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
            rle = Masks.from_arrays(mask[None]).rles[0]
            found.append(one | {"task": "segment", "box": box, "mask": rle})
            points = [x1, y1, 0.9, x2, y2, 0.9, x1, y2, 0.1]
            names = ["left", "right", "other"]
            found.append(one | {"task": "pose", "box": box, "keypoints": points, "keypoint_names": names})
        return found + [base | {"task": task} for task in ("detect", "segment", "pose")]

    return rows


def come_back(folder, corpus, form, task, kind, options):
    """(rows that were labelled, instances of the shards) of each image, after export and `prepare`."""
    photos = folder / "photos"
    photos.mkdir()
    images = tuple((name, size) for name, (size, _) in zip(NAMES, corpus, strict=True))
    for name, size in images:
        Image.fromarray(made.pixels(0, size)).save(photos / name)
    rows = rows_of(corpus)
    settings = {"tasks": ["detect", "segment", "pose"], "classes": list(CLASSES)}
    labels = made.write_labels(folder / "labels", photos=photos, rows=rows, images=images, settings=settings)
    export_labels(labels, [form], output=folder / "out")
    summary = prepare(kind, folder / "shards", workers=0, **options(folder / "out" / form, photos))
    assert summary["rejected"] == 0 and summary["rows"] == len(NAMES)
    found = {row["image_id"]: row for row in read_rows(folder / "shards")}
    for name, size in images:
        row = found[name]
        assert (row["height"], row["width"]) == size and set(row["classes"]) == set(CLASSES) or form == "voc"
        wanted = [r for r in rows(name, "", size) if r["task"] == task and r["box"]]
        yield wanted, row["instances"]


def coco(task):
    return lambda out, photos: {"annotations": [out / f"{task}.json"], "images": photos}


def yolo(task):
    return lambda out, photos: {"data": out / task / "data.yaml"}


def voc(out, photos):
    return {"annotations": out / "detect" / "Annotations", "images": out / "detect" / "JPEGImages", "first_pixel": 1}


def iou(first, second):
    a, b = Masks([first, second], tuple(first["size"])).to_arrays()
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    ("form", "task", "kind", "options", "far"),
    [
        ("coco", "detect", "coco", coco("detect"), 0),
        ("coco", "segment", "coco", coco("segment"), 0),
        ("coco", "pose", "coco", coco("pose"), 0),
        ("yolo-detect", "detect", "yolo", yolo("detect"), 1e-4),
        ("yolo-segment", "segment", "yolo", yolo("segment"), 0.06),
        ("yolo-pose", "pose", "yolo", yolo("pose"), 1e-4),
        ("voc", "detect", "voc", voc, 0.5),
    ],
)
@settings(deadline=None, max_examples=15)
@given(corpora())
def test_what_is_exported_can_be_prepared(form, task, kind, options, far, corpus):
    if form == "voc" and not any(instances for _, instances in corpus):
        return  # no classes
    with tempfile.TemporaryDirectory() as folder:
        for wanted, found in come_back(Path(folder), corpus, form, task, kind, options):
            assert [i["phrase"] for i in found] == [r["phrase"] for r in wanted] and not any(i["crowd"] for i in found)
            for instance, row in zip(found, wanted, strict=True):
                assert np.abs(np.subtract(instance["box"], row["box"])).max() <= far
                if task == "segment":
                    assert iou(instance["mask"], row["mask"]) >= (1 if form == "coco" else 0.9)
                if task == "pose":
                    points = np.reshape(instance["keypoints"], (-1, 3))
                    truth = np.reshape(row["keypoints"], (-1, 3))
                    assert points[:, 2].tolist() == [2, 2, 0]
                    assert np.abs(points[:2, :2] - truth[:2, :2]).max() <= 1e-4
