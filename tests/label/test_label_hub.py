"""Label jobs on data sets of the Hugging Face Hub, ``hf://``, read from a server that speaks its HTTP API."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_hub import serve_hub
from support.label_fakes import FakeEngine, encode, picture, write_images
from support.label_jobs import LabelJob

from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import label

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
OPTIONS = {"tasks": ["detect"], "classes": ["square"], "fragment_size": 4, "exports": ()}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder of the data set ``team/photos``, and the requests for it."""
    folder = tmp_path / "hub" / "team" / "photos"
    folder.mkdir(parents=True)
    with serve_hub(tmp_path / "hub") as (address, asked):
        for name, value in (("HF_ENDPOINT", address), ("HF_HUB_OFFLINE", "0"), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)  # for other processes; this one has read them
        file_url = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + file_url)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        _forget()
        yield folder, asked
    _forget()


def _forget():
    files._store.cache_clear()
    hub.HfFileSystem.clear_instance_cache()


def ids(output):
    return sorted(row["image_id"] for table in Ledger(output).tables() for row in table.to_pylist())


def test_a_folder_of_images(photos, tmp_path):
    folder, asked = photos
    write_images(folder / "train", 60)
    write_images(folder / "train" / "more", 2, start=60)
    summary = label(FakeEngine, "hf://datasets/team/photos/train", tmp_path / "out", num_actors=0, **OPTIONS)
    assert (summary["images"], summary["labelled"]) == (62, 62)
    assert ids(tmp_path / "out") == [f"image{n:03d}.png" for n in range(60)] + [
        "more/image060.png",
        "more/image061.png",
    ]
    assert asked["file"] == 62, "each image is read once, in one request"
    assert asked["info"] < 30, "the repository is not asked about for each image"


def test_a_table_with_images(photos, tmp_path):
    folder, _ = photos
    (folder / "data").mkdir()
    images = [{"bytes": encode(picture(n)), "path": f"{n}.png"} for n in range(10)]
    pq.write_table(pa.table({"image": images, "id": [str(n) for n in range(10)]}), folder / "data" / "train.parquet")
    summary = label(FakeEngine, "hf://datasets/team/photos/data", tmp_path / "out", num_actors=0, **OPTIONS)
    assert summary["labelled"] == 10 and ids(tmp_path / "out") == [str(n) for n in range(10)]


@pytest.mark.ray
def test_workers_on_ray(photos, tmp_path):
    folder, _ = photos
    write_images(folder / "train", 16)
    summary = LabelJob("hf://datasets/team/photos/train", tmp_path / "out", OPTIONS).run()
    assert summary["labelled"] == 16


def test_an_image_that_the_hub_refuses_is_an_error_of_the_store(photos, tmp_path, monkeypatch):
    folder, asked = photos
    monkeypatch.setattr("lumen_ray.label.inputs.RETRY_S", 0.0)
    write_images(folder / "train", 3)
    (folder / "train" / "image001.png").rename(folder / "train" / "forbidden.png")
    summary = label(FakeEngine, "hf://datasets/team/photos/train", tmp_path / "out", num_actors=0, **OPTIONS)
    assert (summary["labelled"], summary["reasons"]) == (2, {"store_unreachable": 1})
    assert asked["file"] == 4, "it is asked for once more"


@pytest.mark.parametrize("source", ["hf://datasets/team/none/train", "hf://datasets/team/photos/nothing"])
def test_what_is_not_there(photos, tmp_path, source):
    with pytest.raises(UserError, match=f"'{source}'") as caught:
        label(FakeEngine, source, tmp_path / "out", num_actors=0, **OPTIONS)
    assert caught.value.reason == "missing_input" and "\n" not in str(caught.value)


def test_without_a_network(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE") as caught:
        label(FakeEngine, "hf://datasets/team/photos/train", tmp_path / "out", num_actors=0, **OPTIONS)
    assert caught.value.reason == "store_unreachable"
    assert "\n" not in str(caught.value)


def test_labels_are_not_written_to_the_hub(photos, tmp_path):
    write_images(tmp_path / "in", 1)
    with pytest.raises(UserError, match="'hf://datasets/team/photos/out' .* is only read") as caught:
        label(FakeEngine, tmp_path / "in", "hf://datasets/team/photos/out", num_actors=0, **OPTIONS)
    assert caught.value.reason == "invalid_output"
