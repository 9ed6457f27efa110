"""The same label job on a local Ray: reading tasks, a pool of model actors, one writer."""

from collections import Counter

import pyarrow.parquet as pq
import pytest
from support import label_fakes
from support.label_fakes import FakeEngine, encode, make_picky_engine, picture, write_images

from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.shards.shards import ShardWriter
from lumen_ray.errors import UserError
from lumen_ray.label.pipeline import label

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def local_ray():
    from lumen_ray.ray_env import init_local, prepare_environment

    prepare_environment()
    import ray

    init_local()
    ray.cloudpickle.register_pickle_by_value(label_fakes)  # the workers cannot import this folder
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(label_fakes)
    ray.shutdown()


def rows_of(output):
    return [row for path in sorted((output / "labels").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_ray_and_this_process_write_the_same_labels(local_ray, tmp_path):
    photos = write_images(tmp_path / "photos", 21)
    (photos / "broken.png").write_bytes(b"nothing")
    options = {"tasks": ["segment", "caption"], "classes": ["square"], "fragment_size": 4, "exports": ()}
    seen = []
    summary = label(
        make_picky_engine, photos, tmp_path / "ray", num_actors=2, batch_size=3,
        progress=lambda s: seen.append(s.done), **options,
    )  # fmt: skip
    assert (summary["images"], summary["labelled"], summary["errors"]) == (22, 20, 2)
    assert seen == list(range(1, 23))
    label(make_picky_engine, photos, tmp_path / "here", num_actors=0, **options)
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "here")
    errors = [pq.read_table(tmp_path / name / "errors.parquet").to_pylist() for name in ("ray", "here")]
    assert errors[0] == errors[1] and {e["reason"] for e in errors[0]} == {"broken_image", "model_error"}


def test_a_shard_folder_and_resuming(local_ray, tmp_path):
    with ShardWriter(tmp_path / "shards", "part-00000.parquet", rows_per_group=4) as writer:
        for i in range(10):
            writer.write(make_row(f"s{i}", encode(picture(i + 6)), (48, 64), "test"))
    options = {"tasks": ["detect"], "classes": ["square"], "fragment_size": 3, "exports": ()}
    label(FakeEngine, tmp_path / "shards", tmp_path / "out", **options)
    (tmp_path / "out" / "ledger" / "000002.json").unlink()
    summary = label(FakeEngine, tmp_path / "shards", tmp_path / "out", **options)
    assert summary["finished_before"] == 7 and summary["images"] == 10
    assert Counter(r["image_id"] for r in rows_of(tmp_path / "out")) == {f"s{i}": 1 for i in range(10)}


def test_mistakes_reach_the_caller_as_one_sentence(local_ray, tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    with pytest.raises(UserError, match=r"num_actors 99 needs 100 CPUs but the Ray cluster has \d+; give at most"):
        label(FakeEngine, photos, tmp_path / "a", tasks=["detect"], classes=["square"], num_actors=99)
    with pytest.raises(UserError, match="no class with keypoints"):  # found out by the actor
        label(FakeEngine, photos, tmp_path / "b", tasks=["pose"], classes=["circle"])
