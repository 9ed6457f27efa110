"""Counts of a shard folder against a plain count over its rows."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards import shards, statistics
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.shards.statistics import Statistics, gather, general


def odd_rows():
    """Without an image, without instances, with a crowd, with a class that is not exhaustive."""
    thing = {"phrase": "thing", "box": [0.0, 0, 9, 9], "mask": None, "keypoints": None, "crowd": True, "area": 81.0}
    large = {**thing, "crowd": False, "area": 96.0**2}
    return [
        make_row("text", None, (0, 0), "chat", tasks=["chat"], messages=[make_message("chat", "hi", "ho")]),
        make_row("empty", b"x", (300, 5000), "odd", tasks=["detect"], classes=["thing", "other"]),
        make_row("crowd", b"x", (200, 100), "odd", tasks=["detect"], classes=["other"], instances=[thing, large]),
    ]


def write(folder, rows, rejected=()):
    with shards.ShardWriter(folder, "part-00000.parquet", rows_per_group=4) as writer:
        for row in rows:
            writer.write(row)
    names = {i["phrase"] for row in rows for i in row["instances"]}
    shards.write_rejected(folder, [{"kind": "annotations", "origin": "a.json", **r} for r in rejected])
    counts = {"annotations": {"in": 9 + len(rejected), "written": 9, "rejected": len(rejected)}}
    categories = [{"name": name, "keypoints": list(scenes.SKELETONS.get(name, ()))} for name in sorted(names)]
    shards.write_manifest(folder, shards.build_manifest([writer.entry], categories=categories, counts=counts))
    return folder


@pytest.fixture(scope="module")
def rows():
    return [scenes.scene_row(5, i, 64) for i in range(12)] + odd_rows()


@pytest.fixture(scope="module", params=[2, 2048])
def counted(request, rows, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("shards"), rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BATCH_ROWS", request.param)
        return gather(folder)


def test_objects_are_counted_by_class_image_and_absence(counted, rows):
    instances = [i for row in rows for i in row["instances"]]
    assert counted.class_instances == Counter(i["phrase"] for i in instances)
    shown = [{i["phrase"] for i in row["instances"]} for row in rows]
    assert counted.class_images == Counter(name for names in shown for name in names)
    absent = [set(row["classes"]) - names for row, names in zip(rows, shown, strict=True)]
    assert counted.class_absent == Counter(name for names in absent for name in names)
    assert counted.masks == sum(i["mask"] is not None for i in instances)
    assert counted.keypoints == sum(i["keypoints"] is not None for i in instances)
    assert counted.crowds == 1
    areas = np.array([i["area"] for i in instances])
    assert counted.object_sizes == {
        "small": (areas < 32**2).sum(),
        "medium": ((areas >= 32**2) & (areas < 96**2)).sum(),
        "large": (areas >= 96**2).sum(),
    }
    assert counted.object_sizes["large"] == 1


def test_images_phrases_and_messages_are_counted(counted, rows):
    assert (counted.rows, counted.sources["scenes"], counted.sources["odd"]) == (15, 12, 2)
    annotated = [len(row["instances"]) for row in rows if row["classes"] or row["instances"]]
    assert counted.per_image == Counter(annotated)
    assert counted.median_per_image() == sorted(annotated)[(len(annotated) - 1) // 2]
    sides = counted.image_side_histogram()
    assert (sides["1-128"], sides["129-256"], sides["over 4096"]) == (12, 1, 1)
    assert sum(sides.values()) == 14, "a text alone has no size"
    messages = Counter(m["task"] for row in rows for m in row["messages"])
    phrases = Counter(p["task"] for row in rows for p in row["phrases"])
    for task, number in (messages + phrases).items():
        assert counted.items[task] == number
    regions = Counter(f"{r['kind']} regions" for row in rows for r in row["regions"])
    assert {name: counted.items[name] for name in regions} == regions


def test_pictures_are_not_read(rows, tmp_path, monkeypatch):
    read = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, columns=None: read.append(columns) or iter_batches(self, size, columns=columns),
    )
    gather(write(tmp_path, rows))
    assert read and not any(c in ("image", "target_image") or "counts" in c for c in read[0])


def test_rejected_records_add_up_by_reason(rows, tmp_path):
    rejected = [{"image_id": f"{i}.jpg", "reason": f"box [{i}, 2.5] lies outside the image of {i}x9"} for i in range(5)]
    rejected.append({"image_id": "z.jpg", "reason": "the caption is empty"})
    found = gather(write(tmp_path, rows[:4], rejected))
    assert found.reasons == {"box … lies outside the image of …": 5, "the caption is empty": 1}
    assert found.examples["box … lies outside the image of …"].startswith("0.jpg: box [0, 2.5]")
    assert found.counts == {"annotations": {"in": 15, "written": 9, "rejected": 6}}


def test_reasons_are_generalised():
    assert general("its category 'a b' contains the reserved token <eos>") == (
        "its category … contains the reserved token <eos>"
    )
    assert general("size mismatch: 640x480, not -3.5") == "size mismatch: …, not …"


def test_an_empty_histogram_is_empty():
    assert (Statistics().image_side_histogram(), Statistics().median_per_image()) == ({}, 0.0)
