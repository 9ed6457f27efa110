"""Weights are written as safetensors writes them, without a second copy of them in memory, and read one by one."""

import hashlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from support.memory import peak_of
from support.tiny_models import tiny_model

from lumen_ray.checkpoints.safetensors_file import DTYPES, WeightsFile, write_weights
from lumen_ray.errors import UserError

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def filled(dtype, shape, seed=0):
    """Any bytes, as values of `dtype`."""
    numbers = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    values = numbers.clamp(max=1) if dtype == torch.bool else numbers
    return values.to(torch.uint8).view(dtype).reshape(shape)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES, st.integers(0, 99)), max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_bytes_are_those_of_safetensors(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    state = {name: filled(*what) for name, what in given.items()}
    write_weights(path, state)
    assert path.read_bytes() == save(state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_back(tmp_path, dtype):
    state = {"some": filled(dtype, (2, 3)), "one": filled(dtype, ()), "none": filled(dtype, (0, 4))}
    write_weights(tmp_path / "w", state)
    for found in (load_file(tmp_path / "w"), WeightsFile(tmp_path / "w")):
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensors_read_do_not_share_memory(tmp_path):
    write_weights(tmp_path / "w", {"some": torch.zeros(3), "more": torch.ones(2)})
    file = WeightsFile(tmp_path / "w")
    file["some"].fill_(5)
    assert file["some"].tolist() == [0, 0, 0] and file["more"].data_ptr() % 16 == 0
    shapes = file.shapes()
    assert {name: list(t.shape) for name, t in shapes.items()} == {"some": [3], "more": [2]} and shapes["some"].is_meta


def test_another_file_in_its_place_is_not_mixed_in(tmp_path):
    write_weights(tmp_path / "w", {"some": torch.zeros(3)})
    write_weights(tmp_path / "other", {"some": torch.ones(3)})
    file, digest = WeightsFile(tmp_path / "w"), hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    os.replace(tmp_path / "other", tmp_path / "w")
    assert file["some"].tolist() == [0, 0, 0] and file.digest() == digest
    assert WeightsFile(tmp_path / "w")["some"].tolist() == [1, 1, 1]


def test_a_file_truncated_while_open_raises_a_user_error(tmp_path):
    write_weights(tmp_path / "w", {"some": torch.zeros(3000)})
    file = WeightsFile(tmp_path / "w")
    os.truncate(tmp_path / "w", 5000)
    with pytest.raises(UserError, match="ends inside 'some'"):
        file["some"]


def test_a_model_with_tied_weights_and_strides(tmp_path):
    state = tiny_model().state_dict()
    assert state["trunk.llm.lm_head.weight"].data_ptr() == state["trunk.llm.model.embed_tokens.weight"].data_ptr()
    state["turned"], state["part"] = torch.rand(3, 5).T, torch.rand(4, 6, requires_grad=True)[:, 2:4]
    write_weights(tmp_path / "w", state)
    assert (tmp_path / "w").read_bytes() == save({name: t.detach().clone().contiguous() for name, t in state.items()})


def test_it_needs_no_second_copy(tmp_path):
    state = {str(i): torch.full((4 << 20,), float(i)) for i in range(8)}  # 16 MiB each
    state["turned"] = torch.ones(2048, 2048).T  # one that must be copied
    with peak_of() as mebibytes:
        write_weights(tmp_path / "w", state)
    assert mebibytes() < 40
