"""The model folder: round trip, and errors for damaged folders."""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import captioning_tokenizer, scene_batch, scrambled, tiny_model, tiny_settings, tiny_tokenizer

from lumen_ray.errors import UserError
from lumen_ray.model import build
from lumen_ray.model.build import ModelMeta, build_model, load_model, save_model


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", scrambled(tiny_model(3)))


def write(path, model):
    meta = ModelMeta("tiny", ["red circle"], {"figure": ["head"]}, {"figure": [[0, 0]]}, "recipe", 12, 3)
    return save_model(path, model.state_dict(), model.settings, tiny_tokenizer(), meta)


def refused(folder, reason):
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_a_saved_model_gives_the_same_losses(folder):
    model, loaded = scrambled(tiny_model(3)), load_model(folder)
    assert loaded.settings == tiny_settings() and not loaded.model.training
    assert loaded.meta == ModelMeta("tiny", ["red circle"], {"figure": ["head"]}, {"figure": [[0, 0]]}, "recipe", 12, 3)
    assert loaded.tokenizer.to_json() == tiny_tokenizer().to_json()
    batch = scene_batch(2)
    with torch.no_grad():
        before, after = model(batch), loaded.model(batch)
    assert before.keys() == after.keys()
    for name in before:
        assert float(before[name].total) == float(after[name].total)


def test_the_version_is_that_of_the_weights(folder, tmp_path):
    version = load_model(folder).version
    assert len(version) == 12 and load_model(write(tmp_path / "same", scrambled(tiny_model(3)))).version == version
    assert load_model(write(tmp_path / "other", tiny_model(4))).version != version


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = build_model(tiny_settings(), 320, seed=1).state_dict()
    assert torch.equal(torch.rand(1), expected)
    second, other = (build_model(tiny_settings(), 320, seed=s).state_dict() for s in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "meta.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder, "not_a_model")


def test_a_folder_that_does_not_exist_is_no_model(tmp_path):
    refused(tmp_path / "nothing", "missing_model")


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _noise(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)


def _other_width(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("link_channels: 32", "link_channels: 40"))


def _missing_tensor(folder):
    state = load_file(folder / "model.safetensors")
    state.pop("trunk.queries.queries.perception")
    save_file(state, folder / "model.safetensors")


def _meta_not_json(folder):
    (folder / "meta.json").write_text("{")


def _meta_of_another_version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"colour": 1}))


def _tokenizer_not_json(folder):
    (folder / "tokenizer.json").write_text("nothing")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate, _empty, _noise, _other_width, _missing_tensor, _meta_not_json, _meta_of_another_version,
        _tokenizer_not_json,
    ],
)  # fmt: skip
def test_damage_raises_user_errors(folder, damage):
    damage(folder)
    refused(folder, "damaged_model")


def test_a_typo_in_the_config_raises_a_user_error(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("stem_channels", "stem_chanels"))
    assert "did you mean 'stem_channels'?" in refused(folder, "invalid_config")


def test_a_full_disk_leaves_the_model_of_before(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_weights = build.write_weights
    monkeypatch.setattr(build, "write_weights", lambda path, state: write_weights(Path("/dev/full"), state))
    other = tiny_model(4)
    with pytest.raises(OSError, match="No space left") as error:
        save_model(folder, other.state_dict(), other.settings, tiny_tokenizer(), ModelMeta("tiny", ["blue square"]))
    assert error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and load_model(folder)


class Killed(BaseException):
    """Not an `Exception`, as a kill is none."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_that_is_overwritten_is_never_half_another(tmp_path, monkeypatch):
    """Killed at any moment, the folder holds the old model, none, or the new one. Files are flushed first."""
    new, tokenizer, model = ModelMeta("tiny", ["blue square"]), captioning_tokenizer(6), tiny_model(4)

    def save_new(folder):
        save_model(folder, model.state_dict(), model.settings, tokenizer, new)
        return folder

    whole, seen, flushed = contents(save_new(tmp_path / "whole")), [], set()
    sync, replace, left = build.sync, os.replace, 0

    def step(function):
        def counted(path, *to):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            assert not to or path in flushed
            flushed.add(path)
            return function(path, *to)

        return counted

    while whole not in seen:
        assert len(seen) < 50
        folder = write(tmp_path / str(len(seen)), tiny_model(3))
        before, left = contents(folder), len(seen)
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(build, "sync", step(sync))
            patch.setattr(build.os, "replace", step(replace))
            save_new(folder)
        found = contents(folder)
        seen.append(found if "model.safetensors" in found else None)
        assert seen[-1] in (None, before, whole)
    assert seen[0] == before and None in seen
    assert not list(tmp_path.glob("*/.partial"))
