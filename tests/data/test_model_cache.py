"""Model folders that are read from a store."""

import shutil

import pytest
from support.tiny_models import tiny_folder

from lumen_ray.data import files, model_cache, urls
from lumen_ray.errors import UserError
from lumen_ray.model.build import load_model, model_version
from lumen_ray.presets import model_folder

URL = "memory://models/one"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A model folder, its copy at `URL`, and an empty cache."""
    monkeypatch.setenv(model_cache.CACHE, str(tmp_path / "cache"))
    folder = tiny_folder(tmp_path / "model")
    for name in files.list_files(folder):
        files.copy(folder / name, urls.join(URL, name))
    yield folder
    files.remove_folder(URL)


def test_a_version_is_downloaded_once(stored, monkeypatch):
    first = model_folder(URL)
    assert model_version(URL) == model_version(stored) == load_model(URL).version
    monkeypatch.setattr(files, "copy", None)  # nothing is copied again
    assert model_folder(URL) == first


def test_another_version_is_another_folder_and_old_ones_go(stored):
    found = []
    for text in ("1", "22", "333"):  # a store in memory has no times, so versions differ by their sizes
        files.write_bytes(urls.join(URL, "meta.json"), text.encode())
        found.append(model_folder(URL))
        assert (found[-1] / "meta.json").read_text() == text
    assert len(set(found)) == 3 and [path.is_dir() for path in found] == [False, True, True]


def test_a_url_without_a_model_is_one_sentence(stored, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="model folder 'memory://models/two' does not exist") as error:
        model_folder("memory://models/two")
    assert error.value.reason == "missing_model"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cache") as error:
        model_folder(URL)
    assert error.value.reason == "invalid_output"
