"""Whole shard folders: counts that add up, equal bytes however many tasks wrote them, and refusals."""

import json
import os
import sys
import time
from dataclasses import dataclass

import pytest
from support.source_fakes import prepare_coco

from lumen_ray.data import files, urls
from lumen_ray.data.command import prepared_line, prepared_lines
from lumen_ray.data.inspect.command import sections
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards import shards
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.shards.statistics import gather
from lumen_ray.data.sources.base import Listing, Outcome, Source, reject
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.errors import UserError
from lumen_ray.keypoints import FIGURE_KEYPOINTS


def prepare_scenes(output, num, seed=0, side=128, **options):
    return prepare_source(output, ScenesSource(num, seed, side), **options)


def all_rows(folder):
    return list(shards.read_rows(folder))


def checksums(folder):
    return {file["path"]: file["sha256"] for file in shards.read_manifest(folder)["files"]}


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
    assert skeletons == dict.fromkeys(("red figure", "green figure", "blue figure"), FIGURE_KEYPOINTS)
    assert [c["name"] for c in manifest["categories"]] == list(scenes.CLASSES)
    assert shards.verify(tmp_path / "out") == []
    assert list(shards.read_rejected(tmp_path / "out")) == []
    assert not list((tmp_path / "out").glob(".staging*"))


def test_coco_counts_add_up_and_every_reject_has_its_reason(tmp_path, small_coco):
    path, images = small_coco
    out = tmp_path / "out"
    prepare_coco(out, [path], images, rows_per_file=4, rows_per_group=2, workers=0)
    manifest = shards.read_manifest(out)
    assert manifest["counts"] == {
        "images": {"in": 9, "written": 8, "rejected": 1},
        "annotations": {"in": 11, "written": 8, "rejected": 3},
    }
    rejected = list(shards.read_rejected(out))
    assert len(rejected) == manifest["rejected"] == 4
    reasons = {record["origin"]: (record["image_id"], record["reason"]) for record in rejected}
    assert reasons["instances.json annotation 101"] == ("", "its image id 77 is not in the file")
    assert "degenerate box" in reasons["instances.json annotation 100"][1]
    assert reasons["instances.json image 4"][0] == "4.jpg"
    assert "its image was rejected" in reasons["instances.json annotation 4"][1]
    rows = all_rows(out)
    assert sorted(row["image_id"] for row in rows) == [f"{number}.jpg" for number in range(9) if number != 4]
    for row in rows:
        assert row["image"] == (images / row["image_id"]).read_bytes()


def test_clipped_annotations_are_counted_and_reported(tmp_path, small_coco, capsys):
    path, images = small_coco
    data = json.loads(path.read_text())
    data["categories"] = [{"id": 1, "name": "cell", "keypoints": ["a", "b"], "skeleton": []}]
    data["annotations"] = [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [40, 2, 10, 10], "keypoints": [50, 5, 2, 1, 1, 1]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [-1, 2, 10, 10], "keypoints": [50, 5, 2, 1, -1, 1]},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 48, 32], "keypoints": [48, 32, 2, 99, 99, 0]},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [50, 2, 10, 10], "keypoints": [50, 5, 2, 50, 5, 2]},
        {"id": 5, "image_id": 4, "category_id": 1, "bbox": [40, 2, 10, 10]},
    ]
    path.write_text(json.dumps(data))
    summary = prepare_coco(tmp_path / "out", [path], images, rows_per_file=4, workers=0)
    wanted = {"boxes clipped": 2, "keypoints outside the image": 3}  # nothing of those rejected whole
    assert summary["changed"] == shards.read_manifest(tmp_path / "out")["changed"] == wanted
    where = shards.read_manifest(tmp_path / "out")["changed_in"]
    assert {change: sorted(names) for change, names in where.items()} == {
        "boxes clipped": ["0.jpg", "1.jpg"],
        "keypoints outside the image": ["0.jpg", "1.jpg"],
    }
    assert summary["counts"]["annotations"] == {"in": 5, "written": 3, "rejected": 2}
    assert "; 2 boxes clipped; 3 keypoints outside the image)" in prepared_line(summary)
    statistics = gather(tmp_path / "out")
    (section,) = [s for s in sections(statistics) if s.title == "records changed"]
    assert section.rows == list(wanted.items()) and statistics.to_dict()["changed"] == wanted


def test_the_seed_decides_the_order(tmp_path, small_coco):
    path, images = small_coco
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        prepare_coco(tmp_path / f"out{number}", [path], images, shuffle_seed=seed, workers=0)
        orders.append([row["image_id"] for row in all_rows(tmp_path / f"out{number}")])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[2])


def test_existing_shards_are_not_overwritten_by_default(tmp_path):
    out = tmp_path / "out"
    prepare_scenes(out, 6, rows_per_file=2, side=64, workers=0)
    before = checksums(out)
    with pytest.raises(UserError, match="already holds shards") as error:
        prepare_scenes(out, 2, seed=1, side=64, workers=0)
    assert error.value.reason == "output_exists"
    assert checksums(out) == before
    prepare_scenes(out, 2, seed=1, rows_per_file=2, side=64, workers=0, overwrite=True)
    (file,) = checksums(out)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", file, "rejected.parquet"]
    assert shards.verify(out) == []


@pytest.mark.parametrize("dies_in", ["move", "write_bytes", "remove"])
def test_a_job_that_dies_while_it_replaces_shards_leaves_whole_ones(tmp_path, monkeypatch, dies_in):
    """Whichever call it dies in and after however many of them, the manifest fits the files that lie there."""
    new = {"seed": 1, "rows_per_file": 2, "side": 64, "workers": 0, "overwrite": True}
    prepare_scenes(tmp_path / "fresh", 6, **new)
    wanted = set(checksums(tmp_path / "fresh").values())
    original = getattr(files, dies_in)
    for number in range(2):
        out, calls = tmp_path / f"out{number}", []
        prepare_scenes(out, 6, rows_per_file=2, side=64, workers=0)
        before = set(checksums(out).values())

        def dying(*args, calls=calls, last=number, **options):
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(args)
            return original(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, dies_in, dying)
            prepare_scenes(out, 6, **new)
        assert shards.verify(out) == []
        assert set(checksums(out).values()) == (wanted if dies_in == "remove" else before)
        prepare_scenes(out, 6, **new)
        assert shards.verify(out) == []
        assert {p.name for p in out.glob("part-*")} == set(checksums(out))
        assert set(checksums(out).values()) == wanted


def test_a_failed_job_leaves_existing_shards(tmp_path, small_coco):
    path, images = small_coco
    out = tmp_path / "out"
    prepare_coco(out, [path], images, workers=0)
    before = checksums(out)
    with pytest.raises(UserError, match="none of 9 images can be used; the first, instances.json image ") as error:
        prepare_coco(out, [path], tmp_path / "images" / "..", workers=0, overwrite=True)
    assert error.value.reason == "empty_input"
    assert checksums(out) == before
    assert shards.verify(out) == []
    assert not list(out.glob(".staging*"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("base", ["", "memory://test-two-jobs/"])
def test_two_jobs_for_one_output_leave_the_whole_shards_of_one(tmp_path, base, overwrite):
    """The second starts and ends while the first is at work."""
    out = f"{base}{tmp_path}/out"
    seconds = []

    def second(done, total):
        if not seconds:
            prepare_scenes(out, 6, seed=1, side=64, rows_per_file=2, workers=0, overwrite=overwrite)
            seconds.append(set(checksums(out).values()))

    def first():
        prepare_scenes(out, 9, side=64, rows_per_file=3, workers=0, overwrite=overwrite, progress=second)

    if overwrite:
        first()
        assert shards.read_manifest(out)["rows"] == 9
    else:
        with pytest.raises(UserError, match="already holds shards"):
            first()
        assert set(checksums(out).values()) == seconds[0]
    assert shards.verify(out) == []
    assert set(files.list_files(out, recursive=True)) == {*checksums(out), "manifest.json", "rejected.parquet"}


def test_the_staging_folder_of_a_dead_job_goes_after_a_day(tmp_path):
    for name, hours in ((".staging-dead", 25), (".staging-alive", 23)):
        place = tmp_path / name / "part-00000.parquet"
        place.parent.mkdir()
        place.write_bytes(b"x")
        for path in (place, place.parent):
            os.utime(path, (time.time() - hours * 3600,) * 2)
    os.utime(tmp_path / ".staging-alive", (0, 0))  # the newest file in it counts
    prepare_scenes(tmp_path, 2, side=64, workers=0)
    assert [path.name for path in tmp_path.glob(".staging*")] == [".staging-alive"]
    assert shards.verify(tmp_path) == []


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
        (lambda: prepare_scenes(tmp_path / "o", 1, workers=-1), "workers must be at least 0, got -1"),
        (lambda: prepare_scenes(tmp_path / "o", 1, shuffle_seed=-1, workers=0), "shuffle_seed must be at least 0"),
        (lambda: prepare_scenes(tmp_path / "file", 1, workers=0), "is a file"),
        (lambda: prepare_scenes(tmp_path / "file" / "x", 1, workers=0), "cannot be made: Not a directory"),
        (lambda: prepare_scenes("/proc/x", 1, workers=0), "cannot be made: "),
        (lambda: prepare_scenes("/proc", 1, workers=0), "cannot be made: "),
        (lambda: prepare_coco(tmp_path / "o", [path], tmp_path / "absent"), "image folder"),
        (lambda: prepare_coco(tmp_path / "o", [tmp_path / "absent"], images), "annotation file"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "o").exists()


def test_real_folders_keep_every_record(test_data, tmp_path):
    for name, listed, images, annotations in (
        ("bccd", ["instances_val.json"], 87, 1138),
        ("nuclei", ["instances_val.json"], 63, 2855),
        ("coco_photos", ["instances_train.json", "person_keypoints_train.json", "captions_train.json"], 77, 514 + 255),
    ):
        folder = test_data / name
        paths = [folder / "annotations" / file for file in listed]
        prepare_coco(tmp_path / name, paths, folder / "images", workers=0)
        counts = shards.read_manifest(tmp_path / name)["counts"]
        assert counts["images"] == {"in": images, "written": images, "rejected": 0}
        assert counts["annotations"] == {"in": annotations, "written": annotations, "rejected": 0}


@dataclass
class ManyRows(Source):
    """Records that give `per_record` rows each; of every one the rows of `broken` come to nothing."""

    records: int
    per_record: int
    broken: tuple[int, ...] = ()
    fault: str = ""
    kind = "many"
    row_kind = "samples"

    def read_listing(self):
        return Listing(range(self.records), {}, rows_per_record=self.per_record)

    def rows(self, record, shared):
        if self.fault == "store":
            error = files.StoreError("the store cannot be reached", "store_unreachable")
            yield Outcome(rejected=[reject("samples", "", "here", error)])
        for number in range(self.per_record):
            name = f"{record}-{number}"
            outcome = Outcome(came_in={"samples": 1, "words": 2})
            if number in self.broken:
                error = UserError("broken", "invalid_record")
                outcome.rejected = [reject("samples", name, "here", error), reject("words", name, "here", error),
                                    reject("words", name, "there", error)]  # fmt: skip
            else:
                outcome.row = make_row(name, None, (0, 0), "many")
                outcome.written = {"words": 1 if self.fault == "lost" else 2}
            yield outcome


def test_records_of_many_rows_are_counted_in_the_tasks_shuffled_and_split_into_files(tmp_path):
    out = tmp_path / "out"
    summary = prepare_source(out, ManyRows(6, 10, broken=(3,)), rows_per_file=8, rows_per_group=4, workers=0)
    assert summary["counts"] == {
        "samples": {"in": 60, "written": 54, "rejected": 6},
        "words": {"in": 120, "written": 108, "rejected": 12},
    }
    entries = shards.read_manifest(out)["files"]
    assert [entry["rows"] for entry in entries] == [8, 1] * 6
    assert [entry["path"] for entry in entries[:3]] == [
        "part-00000.parquet", "part-00000-001.parquet", "part-00001.parquet",
    ]  # fmt: skip
    assert shards.verify(out) == []
    names = [row["image_id"] for row in all_rows(out)]
    assert sorted(names) == sorted(f"{r}-{n}" for r in range(6) for n in range(10) if n != 3)
    numbers = [int(name.split("-")[1]) for name in names[:9]]
    assert numbers != sorted(numbers)
    prepare_source(out, ManyRows(6, 10, broken=(3,)), rows_per_file=8, shuffle_seed=1, workers=0, overwrite=True)
    assert [row["image_id"] for row in all_rows(out)] != names


def test_a_source_that_loses_records_is_found_out(tmp_path):
    with pytest.raises(RuntimeError, match="words do not add up: 8 came in, 4 were written and 0 rejected"):
        prepare_source(tmp_path / "out", ManyRows(2, 2, fault="lost"), workers=0)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_store_that_cannot_be_reached_stops_the_job(tmp_path):
    with pytest.raises(UserError, match="the store cannot be reached"):
        prepare_source(tmp_path / "out", ManyRows(2, 2, fault="store"), workers=0)


def test_an_input_without_usable_rows_is_reported_with_its_first_reason(tmp_path):
    with pytest.raises(
        UserError, match="none of 2 samples can be used; the first, here \\('0-0'\\): broken \\(correct the record"
    ):
        prepare_source(tmp_path / "out", ManyRows(1, 2, broken=(0, 1)), workers=0)
    with pytest.raises(UserError, match="the many input lists no samples"):
        prepare_source(tmp_path / "out", ManyRows(0, 2), workers=0)


def test_a_store_gives_and_takes_the_same_as_a_folder(tmp_path, small_coco):
    path, images = small_coco
    base = "memory://test-prepare"
    for file in (path, *images.iterdir()):
        files.write_bytes(urls.join(base, "in", file.name), file.read_bytes())
    prepare_coco(tmp_path / "out", [path], images, rows_per_file=4, workers=0)
    for _ in range(2):  # the second over the first
        options = {"rows_per_file": 4, "workers": 0, "overwrite": True}
        prepare_coco(f"{base}/out", [f"{base}/in/instances.json"], f"{base}/in", **options)
        assert checksums(f"{base}/out") == checksums(tmp_path / "out")
        assert shards.verify(f"{base}/out") == []
        assert list(shards.read_rejected(f"{base}/out")) == list(shards.read_rejected(tmp_path / "out"))
        names = ["manifest.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "rejected.parquet"]
        assert files.list_files(f"{base}/out", recursive=True) == names
    (file, *_) = shards.read_manifest(f"{base}/out")["files"]
    assert shards.read_row_group(f"{base}/out", file["path"], 0) == shards.read_row_group(
        tmp_path / "out", file["path"], 0
    )
    with pytest.raises(UserError, match="already holds shards"):
        prepare_scenes(f"{base}/out", 2, workers=0)
    files.remove(f"{base}/out/{file['path']}")
    assert shards.verify(f"{base}/out") == ["part-00000.parquet is missing"]
    with pytest.raises(UserError, match="part-00000.parquet' is missing"):
        shards.read_row_group(f"{base}/out", file["path"], 0)
    with pytest.raises(UserError, match="has no manifest.json"):
        shards.read_manifest(base)


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
        found[workers] = (checksums(scenes_out), checksums(coco_out), list(shards.read_rejected(coco_out)))
        assert shards.read_manifest(coco_out)["counts"]["annotations"]["rejected"] == 3
    assert found[0] == found[1] == found[2] == found[None]


@pytest.mark.ray
def test_a_user_error_in_a_task_is_one_sentence(local_ray, tmp_path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # this module is on no worker's path
    with pytest.raises(UserError, match="the store cannot be reached") as error:
        prepare_source(tmp_path / "out", ManyRows(2, 2, fault="store"), workers=2)
    assert (str(error.value), error.value.reason) == ("the store cannot be reached", "store_unreachable")
    assert not list((tmp_path / "out").glob(".staging*"))


def test_rows_that_train_nothing_are_counted(tmp_path, small_coco):
    path, images = small_coco
    data = json.loads(path.read_text())
    data["annotations"] = [{"id": n, "image_id": n, "category_id": 1 + (n < 2), "bbox": [1, 2, 9, 9]} for n in range(9)]
    path.write_text(json.dumps(data))
    summary = prepare_coco(tmp_path / "out", [path], images, workers=0)
    assert summary["untrained"] == shards.read_manifest(tmp_path / "out")["untrained"] == 2
    assert "2 of 8 images train nothing: no class is left that they are annotated for" in prepared_lines(summary)


@dataclass
class Repeated(ManyRows):
    """Two rows of one id."""

    def rows(self, record, shared):
        yield Outcome(make_row("same", None, (0, 0), "many"), came_in={"samples": 1})


def test_two_rows_of_one_id_are_refused(tmp_path):
    with pytest.raises(UserError, match="two rows have the image id 'same'"):
        prepare_source(tmp_path / "out", Repeated(2, 1), workers=0, rows_per_file=1)
