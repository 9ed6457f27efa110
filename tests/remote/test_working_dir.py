"""What a job takes along."""

import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumen_ray.errors import UserError
from lumen_ray.remote import working_dir
from lumen_ray.remote.working_dir import WorkingDir


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names(paths):
    return sorted(str(path) for path in paths)


def test_ignore_files_and_usual_folders_are_left_out(tmp_path):
    write(
        tmp_path, "recipe.yaml", "data/a.jpg", "data/keep/b.jpg", ".git/HEAD", ".env", "runs/x", "own/__pycache__/m.pyc"
    )
    (tmp_path / ".gitignore").write_text("/runs\n")
    (tmp_path / "data" / ".rayignore").write_text("*.jpg\n!keep/b.jpg\n")
    found = WorkingDir.scan(tmp_path)
    assert names(found.files) == [".gitignore", "data/.rayignore", "data/keep/b.jpg", "recipe.yaml"]
    assert names(found.left_out) == [".env", ".git", "data/a.jpg", "own/__pycache__", "runs"]
    assert "left out: .env, .git, runs" in found.describe()


def test_the_zip_has_the_files_and_is_the_same_each_time(tmp_path):
    folder = tmp_path / "folder"
    write(folder, "a/b.txt", "c.txt")
    for name in ("one.zip", "two.zip"):
        WorkingDir.scan(folder).write(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == {"a/b.txt": b"a/b.txt", "c.txt": b"c.txt"}
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_holds(tmp_path):
    write(tmp_path, "in/a.txt", "out/b.txt")
    (tmp_path / ".rayignore").write_text("out\n")
    found = WorkingDir.scan(tmp_path)
    assert found.holds(tmp_path / "in") and found.holds(tmp_path / "in/a.txt")
    assert not found.holds(tmp_path / "out/b.txt") and not found.holds(tmp_path.parent) and not found.holds("/etc")


def test_too_large(tmp_path, monkeypatch):
    write(tmp_path, "photos/a.jpg", "b.txt")
    monkeypatch.setattr(working_dir, "MAX_BYTES", 10)
    with pytest.raises(UserError, match=r"found first: .*photos .*\.rayignore.*--working-dir, 'none'"):
        WorkingDir.scan(tmp_path)
    monkeypatch.setattr(working_dir, "MAX_BYTES", 1000)
    monkeypatch.setattr(working_dir, "MAX_FILES", 1)
    with pytest.raises(UserError, match="more than"):
        WorkingDir.scan(tmp_path)


def test_not_a_folder(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        WorkingDir.scan(tmp_path / "nothing")


@given(
    files=st.sets(st.sampled_from(["a/x", "a/y", "b/x", "b/c/z", "t"]), min_size=1),
    ignored=st.sets(st.sampled_from(["a", "b", "b/c", "x", "z", "t"])),
)
def test_every_file_is_packed_or_left_out(tmp_path_factory, files, ignored):
    folder = tmp_path_factory.mktemp("folder")
    write(folder, *files)
    (folder / ".rayignore").write_text("".join(f"{name}\n" for name in sorted(ignored)))
    found = WorkingDir.scan(folder)
    for name in files:
        out = [path for path in found.left_out if folder / path in [folder / name, *(folder / name).parents]]
        assert found.holds(folder / name) != bool(out)
