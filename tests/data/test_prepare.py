"""Whole shard folders: counts that add up, equal bytes however many tasks wrote them, and refusals."""

import json
import os

import numpy as np
import pytest

from lumen_ray.data import scenes, shards
from lumen_ray.data.prepare import prepare_coco, prepare_scenes
from lumen_ray.data.scenes import encode_jpeg
from lumen_ray.errors import UserError


def all_rows(folder):
    files = shards.read_manifest(folder)["files"]
    return [
        row
        for file in files
        for index in range(len(file["row_groups"]))
        for row in shards.read_row_group(folder, file["path"], index)
    ]


def checksums(folder):
    return {file["path"]: file["sha256"] for file in shards.read_manifest(folder)["files"]}


@pytest.fixture
def small_coco(tmp_path):
    """Nine photos, one of them truncated, with an object each and one degenerate box."""
    images = tmp_path / "images"
    images.mkdir()
    listed, annotations = [], []
    for number in range(9):
        data = encode_jpeg(np.full((32, 48, 3), number * 20, np.uint8))
        (images / f"{number}.jpg").write_bytes(data[:200] if number == 4 else data)
        listed.append({"id": number, "file_name": f"{number}.jpg", "height": 32, "width": 48})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [number, 2, 10, 10]})
    annotations.append({"id": 100, "image_id": 0, "category_id": 1, "bbox": [1, 2, 0, 10]})
    annotations.append({"id": 101, "image_id": 77, "category_id": 1, "bbox": [1, 2, 3, 10]})
    path = tmp_path / "instances.json"
    categories = [{"id": 1, "name": "cell"}]
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return path, images


def test_scenes_are_written_in_order_with_their_skeletons(tmp_path):
    seen = []
    summary = prepare_scenes(
        tmp_path / "out", 25, seed=4, side=64, rows_per_group=4, rows_per_file=10, workers=0,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(10, 25), (20, 25), (25, 25)]
    assert (summary["rows"], summary["files"], summary["rejected"]) == (25, 3, 0)
    assert all_rows(tmp_path / "out") == [scenes.scene_row(4, index, 64) for index in range(25)]
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["counts"] == {"images": {"in": 25, "written": 25, "rejected": 0}}
    skeletons = {c["name"]: tuple(c["keypoints"]) for c in manifest["categories"] if c["keypoints"]}
    assert skeletons == dict.fromkeys(("red figure", "green figure", "blue figure"), scenes.KEYPOINTS)
    assert [c["name"] for c in manifest["categories"]] == list(scenes.CLASSES)
    assert shards.verify(tmp_path / "out") == []
    assert shards.read_rejected(tmp_path / "out") == []
    assert not (tmp_path / "out" / ".staging").exists()


def test_coco_counts_add_up_and_every_reject_has_its_reason(tmp_path, small_coco):
    path, images = small_coco
    out = tmp_path / "out"
    prepare_coco(out, [path], images, rows_per_file=4, rows_per_group=2, workers=0)
    manifest = shards.read_manifest(out)
    assert manifest["counts"] == {
        "images": {"in": 9, "written": 8, "rejected": 1},
        "annotations": {"in": 11, "written": 8, "rejected": 3},
    }
    rejected = shards.read_rejected(out)
    assert len(rejected) == manifest["rejected"] == 4
    reasons = {record["origin"]: (record["image_id"], record["reason"]) for record in rejected}
    assert reasons["instances.json annotation 101"] == ("", "its image is not in the file")
    assert "degenerate box" in reasons["instances.json annotation 100"][1]
    assert reasons["instances.json"][0] == "4.jpg"
    assert "its image was rejected" in reasons["instances.json annotation 4"][1]
    rows = all_rows(out)
    assert sorted(row["image_id"] for row in rows) == [f"{number}.jpg" for number in range(9) if number != 4]
    for row in rows:
        assert row["image"] == (images / row["image_id"]).read_bytes()


def test_the_seed_decides_the_order(tmp_path, small_coco):
    path, images = small_coco
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        prepare_coco(tmp_path / f"out{number}", [path], images, shuffle_seed=seed, workers=0)
        orders.append([row["image_id"] for row in all_rows(tmp_path / f"out{number}")])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[2])


def test_an_output_that_holds_shards_is_not_overwritten_unasked(tmp_path):
    out = tmp_path / "out"
    prepare_scenes(out, 6, rows_per_file=2, side=64, workers=0)
    before = checksums(out)
    with pytest.raises(UserError, match="already holds shards") as error:
        prepare_scenes(out, 2, seed=1, side=64, workers=0)
    assert error.value.reason == "output_exists"
    assert checksums(out) == before
    prepare_scenes(out, 2, seed=1, rows_per_file=2, side=64, workers=0, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "part-00000.parquet", "rejected.parquet"]
    assert shards.verify(out) == []


def test_a_job_that_fails_leaves_what_was_there(tmp_path, small_coco):
    path, images = small_coco
    out = tmp_path / "out"
    prepare_coco(out, [path], images, workers=0)
    before = checksums(out)
    with pytest.raises(UserError, match="not one of 9 images can be used; the first: ") as error:
        prepare_coco(out, [path], tmp_path / "images" / "..", workers=0, overwrite=True)
    assert error.value.reason == "empty_input"
    assert checksums(out) == before
    assert shards.verify(out) == []
    assert not (out / ".staging").exists()


def test_other_files_in_the_output_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    prepare_scenes(tmp_path, 2, side=64, workers=0)
    prepare_scenes(tmp_path, 2, side=64, workers=0, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_settings_that_cannot_work_are_refused(tmp_path, small_coco):
    path, images = small_coco
    (tmp_path / "file").write_text("")
    for call, message in (
        (lambda: prepare_scenes(tmp_path / "o", 0), "number of scenes"),
        (lambda: prepare_scenes(tmp_path / "o", 1, seed=-1), "seed"),
        (lambda: prepare_scenes(tmp_path / "o", 1, side=10), "side"),
        (lambda: prepare_scenes(tmp_path / "o", 1, rows_per_group=0), "rows_per_group"),
        (lambda: prepare_scenes(tmp_path / "o", 1, rows_per_file=0), "rows_per_file"),
        (lambda: prepare_scenes(tmp_path / "file", 1, workers=0), "is a file"),
        (lambda: prepare_coco(tmp_path / "o", [path], tmp_path / "absent"), "image folder"),
        (lambda: prepare_coco(tmp_path / "o", [tmp_path / "absent"], images), "annotation file"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "o").exists()


def test_real_folders_keep_every_record(test_data, tmp_path):
    for name, files, images, annotations in (
        ("bccd", ["instances_val.json"], 87, 1138),
        ("nuclei", ["instances_val.json"], 63, 2855),
        ("coco_photos", ["instances_train.json", "person_keypoints_train.json", "captions_train.json"], 77, 514 + 255),
    ):
        folder = test_data / name
        paths = [folder / "annotations" / file for file in files]
        prepare_coco(tmp_path / name, paths, folder / "images", workers=0)
        counts = shards.read_manifest(tmp_path / name)["counts"]
        assert counts["images"] == {"in": images, "written": images, "rejected": 0}
        assert counts["annotations"] == {"in": annotations, "written": annotations, "rejected": 0}


@pytest.fixture(scope="module")
def local_ray():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    from lumen_ray import ray_env

    ray_env.prepare_environment()
    ray_env.init_local()
    yield
    ray.shutdown()


@pytest.mark.ray
def test_files_do_not_depend_on_the_number_of_tasks(local_ray, tmp_path, small_coco):
    path, images = small_coco
    found = {}
    for workers in (0, 1, 2, None):
        done = []
        scenes_out, coco_out = tmp_path / f"scenes{workers}", tmp_path / f"coco{workers}"
        summary = prepare_scenes(
            scenes_out, 40, side=64, rows_per_file=10, rows_per_group=4, workers=workers,
            progress=lambda now, total: done.append((now, total)),  # noqa: B023  called before the next round
        )  # fmt: skip
        assert (summary["rows"], summary["files"]) == (40, 4)
        assert done == [(10, 40), (20, 40), (30, 40), (40, 40)]
        prepare_coco(coco_out, [path], images, rows_per_file=4, workers=workers)
        assert shards.verify(scenes_out) == shards.verify(coco_out) == []
        found[workers] = (checksums(scenes_out), checksums(coco_out), shards.read_rejected(coco_out))
        assert shards.read_manifest(coco_out)["counts"]["annotations"]["rejected"] == 3
    assert found[0] == found[1] == found[2] == found[None]
