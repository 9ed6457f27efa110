"""The path layer: the same answers for local folders and for a store, and what it says when something is wrong."""

import errno
import os
import pickle
import uuid

import fsspec
import pytest
from pyarrow import fs

from lumen_ray.data import files, patterns, urls
from lumen_ray.errors import UserError


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    """A folder of each kind."""
    if request.param == "local":
        yield str(tmp_path)
        return
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    store = fsspec.filesystem("memory")
    if store.exists(f"/{name}"):
        store.rm(f"/{name}", recursive=True)


def put(root, *names):
    for name in names:
        location = urls.join(root, name)
        files.make_folder(urls.parent(location))
        files.write_bytes(location, name.encode())


def test_written_files_can_be_read(root):
    name = "a b%20#1/ä?.txt" if urls.is_url(root) else "a b%20#1/ä.txt"
    put(root, name)
    location = urls.join(root, name)
    assert files.read_bytes(location) == name.encode()
    assert files.read_text(location) == name
    assert files.size(location) == len(name.encode())
    assert files.is_file(location)
    assert files.is_dir(root)
    assert files.is_dir(urls.parent(location))
    assert not files.exists(urls.join(root, "b"))
    with files.open_input(location) as file:
        file.seek(2)
        assert file.read(1) == b"b"
    assert pickle.loads(pickle.dumps(location)) == location


def test_listing_is_sorted_and_relative(root):
    put(root, "b.JPG", "a.jpg", "x/c.jpg", "x/y/d.png", ".staging-1/e.txt")
    assert files.list_files(root) == ["a.jpg", "b.JPG"]
    assert files.list_files(root, [".jpg"], recursive=True) == ["a.jpg", "b.JPG", "x/c.jpg"]
    assert files.list_files(urls.join(root, "x"), recursive=True) == ["c.jpg", "y/d.png"]
    with pytest.raises(UserError, match="folder .* does not exist"):
        files.list_files(urls.join(root, "no"))


def test_patterns(root):
    put(root, "b.jpg", "a.jpg", "x/c.jpg", "x/y/d.jpg", "e.png")

    def found(pattern):
        return [location[len(root) + 1 :] for location in patterns.expand(urls.join(root, pattern))]

    assert found("*.jpg") == ["a.jpg", "b.jpg"]
    assert found("**/*.jpg") == ["a.jpg", "b.jpg", "x/c.jpg", "x/y/d.jpg"]
    assert found("x/*.jpg") == ["x/c.jpg"]
    assert found("[ab].jpg") == ["a.jpg", "b.jpg"]
    assert found("?.png") == ["e.png"]
    assert found("no.jpg") == ["no.jpg"]  # nothing to expand
    with pytest.raises(UserError, match="no file matches"):
        found("*.gif")


def test_moving_and_removing(root):
    put(root, "s/a", "s/b")
    files.move(urls.join(root, "s/a"), urls.join(root, "c"))
    assert files.list_files(root, recursive=True) == ["c", "s/b"]
    files.remove(urls.join(root, "c"))
    files.remove(urls.join(root, "c"))
    files.remove_folder(urls.join(root, "s"))
    files.remove_folder(urls.join(root, "s"))
    assert not files.exists(urls.join(root, "s"))
    with pytest.raises(UserError, match="does not exist"):
        files.remove(urls.join(root, "c"), missing_ok=False)


def test_a_finished_file_is_put_into_place(root, tmp_path):
    (tmp_path / "partial").write_bytes(b"done")
    files.make_folder(root)
    files.put(tmp_path / "partial", urls.join(root, "whole"))
    assert files.read_bytes(urls.join(root, "whole")) == b"done"
    assert not (tmp_path / "partial").exists()


def test_a_read_error_is_one_sentence(root):
    put(root, "x/a")
    for name in ("no", "x", "x" * 5000):
        with pytest.raises(UserError) as error:
            files.read_bytes(urls.join(root, name))
        assert error.value.reason in ("missing_file", "unreadable_file")
        assert not isinstance(error.value, files.StoreError)
        assert not files.is_file(urls.join(root, name))
    files.write_bytes(urls.join(root, "latin"), b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        files.read_text(urls.join(root, "latin"))
    contents = list(files.read_many([urls.join(root, n) for n in ("x/a", "no", "latin")]))
    assert (contents[0], contents[1].reason, contents[2]) == (b"x/a", "missing_file", b"\xff\xfe\xfa")


@pytest.mark.parametrize("name", ["file", "file/x", "/proc/x"])
def test_where_nothing_can_be_written_is_one_sentence(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made: ") as error:
        files.make_folder(tmp_path / name)
    assert error.value.reason == "invalid_output" and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be written: ") as error:
        files.write_bytes(tmp_path / name / "y.json", b"{}")
    assert error.value.reason == "invalid_output" and "\n" not in str(error.value)


def test_a_local_output_must_not_be_a_url(tmp_path):
    assert files.local_folder(tmp_path) == files.local_folder(f"file://{tmp_path}") == tmp_path
    assert files.local_folder("~/x").is_absolute()
    with pytest.raises(UserError, match="output folder 's3://bucket/x' is a URL; give a folder on") as error:
        files.local_folder("s3://key@bucket/x?region=r")
    assert error.value.reason == "invalid_output"


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "words", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space", "disk_full"),
        (errno.EDQUOT, "the disk quota is used up; free some space", "disk_full"),
        (errno.EROFS, "Read-only file system; give another output folder", "invalid_output"),
    ],
)
def test_a_failed_write_is_not_reported_as_a_read(tmp_path, monkeypatch, code, words, reason):
    (tmp_path / "a").write_bytes(b"x")

    class Failing:
        move = delete_file = delete_dir = staticmethod(failing(code))

        def __getattr__(self, name):
            return getattr(fs.LocalFileSystem(), name)

    monkeypatch.setattr(files, "filesystem", lambda location: (Failing(), str(location)))
    monkeypatch.setattr(files.os, "replace", failing(code))
    for verb, call in (
        ("written", lambda: files.put(tmp_path / "a", tmp_path / "b")),
        ("written", lambda: files.write_bytes(tmp_path / "b", b"x")),
        ("moved", lambda: files.move(tmp_path / "a", tmp_path / "b")),
        ("removed", lambda: files.remove(tmp_path / "a")),
        ("removed", lambda: files.remove_folder(tmp_path)),
    ):
        with pytest.raises(UserError, match=f"cannot be {verb}: {words}") as error:
            call()
        assert error.value.reason == reason
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "no half-written file stays"


def test_a_missing_folder_cannot_be_written_to(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be written: No such file or directory") as error:
        files.put(tmp_path / "a", tmp_path / "no" / "b")
    assert error.value.reason == "invalid_output"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_reported(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "a").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        files.read_bytes(tmp_path / "a")


STORE = "?endpoint_override=localhost:9&scheme=http"


def test_settings_of_a_store_stay_behind_the_path():
    base = "s3://bucket/folder" + STORE
    assert urls.join(base, "x", "a b.jpg") == "s3://bucket/folder/x/a b.jpg" + STORE
    assert urls.parent(base) == "s3://bucket" + STORE
    assert urls.base_name(base) == "folder"
    assert urls.stem("gs://b/x/train.json?retry_limit_seconds=3") == "train"
    assert urls.shown("s3://key:secret@bucket/folder" + STORE) == "s3://bucket/folder"
    assert urls.map_path(base, str.upper) == "s3://BUCKET/FOLDER" + STORE
    assert urls.absolute("s3://bucket/folder/" + STORE) == base
    assert urls.join("s3://b/x", "what?.jpg") == "s3://b/x/what?.jpg"  # no settings: the name's own question mark
    assert urls.join("/data", "s3://b/x") == "s3://b/x"
    assert urls.absolute("file:///x/y") == "/x/y"
    assert urls.absolute("x") == os.path.abspath("x")
    store, path = files.filesystem("s3://key:secret@bucket/a b#%20.jpg" + STORE + "&region=x")
    assert isinstance(store, fs.S3FileSystem)
    assert path == "bucket/a b#%20.jpg"
    assert not files.is_file("s3://bucket/" + "x" * 1100 + STORE)  # asks nobody
    store, path = files.filesystem("gs://anonymous@bucket/x")
    assert isinstance(store, fs.GcsFileSystem)
    assert path == "bucket/x"
    store, _ = files.filesystem("s3://anonymous@bucket/x?region=eu-west-1")
    assert store.region == "eu-west-1"


def test_a_store_that_cannot_be_reached_stops_the_job():
    for location, message in (
        ("s3://bucket/a.jpg?endpoint_override=127.0.0.1:9&scheme=http&region=x", "cannot be reached; check the bucket"),
        ("s3:///a.jpg", "names no bucket"),
        ("nothing9://a.jpg", "'nothing9://' is no kind of store; give a local path"),
        ("s3://bucket/a.jpg?nonsense=1", "cannot open"),
    ):
        for ask in (files.read_bytes, files.is_file, files.list_files):
            with pytest.raises(files.StoreError, match=message) as error:
                ask(location)
            assert "\n" not in str(error.value)
            if "reached" in message:
                break  # each attempt waits for Arrow's retries
    assert isinstance(pickle.loads(pickle.dumps(error.value)), files.StoreError)


def test_an_atomic_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
