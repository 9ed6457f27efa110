"""Label jobs whose input and output are in a bucket, on the `moto` library's S3 server."""

from collections import Counter

import pytest
from support.label_fakes import FakeEngine, encode, picture, write_images
from support.label_jobs import LabelJob
from support.s3_server import s3_server

from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.inference.records import TIME_COLUMNS
from lumen_ray.label.ledger import Ledger, open_finished
from lumen_ray.label.pipeline import label

pytest.importorskip("moto", reason="needs moto[server]")

OPTIONS = {"tasks": ["segment", "caption"], "classes": ["square"], "fragment_size": 4}


@pytest.fixture(scope="module")
def bucket():
    with s3_server("labels") as url:
        yield url


def fill(bucket, prefix, number):
    for i in range(number):
        files.write_bytes(bucket(f"{prefix}/{i % 3}/image{i:03d}.png"), encode(picture(i)))
    return bucket(prefix)


def rows(output):
    """The label rows by image id, without the paths and times."""
    found = {}
    for table in Ledger(output).tables():
        for row in table.drop_columns(["path", *TIME_COLUMNS]).to_pylist():
            found.setdefault(row["image_id"].rpartition("/")[2], []).append({**row, "image_id": ""})
    return found


def test_a_bucket_and_a_folder_get_the_same_labels(bucket, tmp_path):
    source = fill(bucket, "same/in", 10)
    files.write_bytes(bucket("same/in/broken.png"), b"nothing")
    summary = label(FakeEngine, source, bucket("same/out"), num_actors=0, **OPTIONS)
    assert (summary["images"], summary["labelled"], summary["errors"]) == (11, 10, 1) and summary["exports"] == {}
    label(FakeEngine, write_images(tmp_path / "in", 10), tmp_path / "out", num_actors=0, exports=(), **OPTIONS)
    assert rows(bucket("same/out")) == rows(tmp_path / "out")
    (error,) = open_finished(bucket("same/out")).entry(2)["errors"]
    assert error["image_id"] == "broken.png" and error["reason"] == "broken_image"
    again = label(FakeEngine, source, bucket("same/out"), num_actors=0, **OPTIONS)
    assert again["finished_before"] == 11 and again["instances"] == summary["instances"]
    with pytest.raises(UserError, match="coco cannot be written"):
        label(FakeEngine, source, bucket("same/x"), num_actors=0, exports=["coco"], **OPTIONS)


def test_a_bucket_that_is_not_there_is_one_sentence(bucket, tmp_path):
    write_images(tmp_path / "in", 1)
    missing = bucket("x").replace("s3://labels", "s3://nowhere")
    for source, output in ((tmp_path / "in", missing), (missing, tmp_path / "out")):
        with pytest.raises(UserError) as caught:
            label(FakeEngine, source, output, num_actors=0, **OPTIONS)
        assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.ray
def test_a_killed_job_leaves_nothing_missing_or_doubled(bucket, tmp_path):
    """Driver and workers are processes of their own."""
    source, output = fill(bucket, "killed/in", 48), bucket("killed/out")
    job, ledger = LabelJob(source, output, OPTIONS), Ledger(output)
    job.kill_after(3)
    assert 3 <= len(ledger.done()) < 12
    summary = job.run()
    assert summary["images"] == summary["labelled"] == 48
    found = Counter(row["image_id"] for table in ledger.tables() for row in table.to_pylist())
    assert found == {f"{i % 3}/image{i:03d}.png": 2 for i in range(48)}  # an instance and a caption
    label(FakeEngine, write_images(tmp_path / "in", 48), tmp_path / "out", num_actors=0, exports=(), **OPTIONS)
    assert rows(output) == rows(tmp_path / "out")
