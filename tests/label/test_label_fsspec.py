"""Label jobs in a store that fsspec knows and pyarrow does not: ``az://``, whose library is a fake."""

import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry
from support.label_fakes import FakeEngine, write_images
from support.label_jobs import LabelJob

from lumen_ray.data import files
from lumen_ray.errors import UserError
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.pipeline import label
from lumen_ray.label.status import label_status

FAKES = Path(__file__).resolve().parents[1] / "support" / "fake_azure"
OPTIONS = {"tasks": ["detect"], "classes": ["square"], "fragment_size": 4}


def forget_stores():
    files._store.cache_clear()
    for protocol in ("az", "abfs"):
        _registry.pop(protocol, None)


@pytest.fixture
def azure(tmp_path, monkeypatch):
    """The folder behind ``az://``."""
    monkeypatch.setenv("FAKE_AZURE", str(tmp_path / "azure"))
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.delitem(sys.modules, "adlfs", raising=False)
    forget_stores()
    yield tmp_path / "azure"
    forget_stores()
    sys.modules.pop("adlfs", None)


def check(summary, azure, images):
    assert (summary["images"], summary["labelled"], summary["output"]) == (images, images, "az://box/out")
    assert label_status("az://box/out")["state"] == "finished"
    rows = [row["image_id"] for table in Ledger("az://box/out").tables() for row in table.to_pylist()]
    assert rows == [f"image{n:03d}.png" for n in range(images)]
    assert len(list((azure / "box" / "out" / "labels").iterdir())) == -(-images // 4)


def test_a_job_reads_and_writes_through_fsspec(azure):
    write_images(azure / "box" / "in", 10)
    check(label(FakeEngine, "az://box/in", "az://box/out", num_actors=0, **OPTIONS), azure, 10)


@pytest.mark.ray
def test_workers_on_ray_share_the_store(azure):
    """What other processes wrote is seen, whatever was listed before."""
    write_images(azure / "box" / "in", 24)
    check(LabelJob("az://box/in", "az://box/out", OPTIONS, [FAKES]).run(), azure, 24)


def test_what_another_process_wrote_is_listed(azure):
    files.write_bytes("az://box/a/1.txt", b"x")
    assert files.list_files("az://box/a") == ["1.txt"]
    (azure / "box" / "a" / "2.txt").write_bytes(b"y")
    assert files.list_files("az://box/a") == ["1.txt", "2.txt"] and files.is_file("az://box/a/2.txt")
    files.move("az://box/a/2.txt", "az://box/a/3.txt")
    files.remove("az://box/a/1.txt")
    assert files.list_files("az://box/a") == ["3.txt"]


def test_errors_of_the_stores_own_library_are_one_sentence(azure, tmp_path):
    for source, output in (
        ("az://forbidden/in", tmp_path / "out"),
        (write_images(tmp_path / "in", 1), "az://forbidden/x"),
    ):
        with pytest.raises(UserError) as caught:
            label(FakeEngine, source, output, num_actors=0, **OPTIONS)
        assert caught.value.reason == "store_unreachable" and "\n" not in str(caught.value)
        assert "AZURE_STORAGE_ACCOUNT_NAME" in str(caught.value) and "AuthenticationFailed" in str(caught.value)


def test_credentials_that_are_missing(azure, tmp_path, monkeypatch):
    monkeypatch.delenv("FAKE_AZURE")
    with pytest.raises(UserError, match="'az://' paths cannot be used: .*account_name with credentials"):
        label(FakeEngine, "az://box/in", tmp_path / "out", num_actors=0, **OPTIONS)


def test_a_library_that_is_missing_is_named(azure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match="'az://' paths cannot be used: Install adlfs") as caught:
        label(FakeEngine, "az://box/in", tmp_path / "out", num_actors=0, **OPTIONS)
    assert caught.value.reason == "unknown_store" and "\n" not in str(caught.value)
