"""Models without weights are the same models, and get theirs without a second copy."""

import threading
from dataclasses import replace

import pytest
import torch
from support.memory import peak_of
from support.tiny_models import EXPERTS, llm, scene_batch, tiny_model, tiny_settings, tiny_tokenizer
from torch import nn

from lumen_ray.meta_init import on_meta, put_weights
from lumen_ray.model.build import ModelMeta, count_parameters, load_model, save_model

#: its weights are 100 MiB and more, its largest tensor 4
LARGE = {
    "llm": llm() | {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8, "head_dim": 64,
    },
}  # fmt: skip


def ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


@pytest.fixture(params=[{}, EXPERTS, {"llm": llm("qwen3"), "lumen": None, **EXPERTS}])
def pair(request):
    """A model, and the same without weights."""
    with on_meta():
        empty = tiny_model(**request.param)
    return tiny_model(**request.param), empty


def test_only_the_weights_are_left_out(pair):
    whole, empty = pair
    assert all(p.is_meta for p in empty.parameters()) and ties(empty) == ties(whole) != []
    for (name, p), (other, q) in zip(whole.named_parameters(), empty.named_parameters(), strict=True):
        assert (name, p.shape, p.dtype, p.requires_grad) == (other, q.shape, q.dtype, q.requires_grad)
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())


def test_weights_are_put_in_by_name_and_tied_ones_stay_tied(pair):
    (whole, empty), asked = pair, []
    state = whole.state_dict()

    def read(name):
        asked.append(name)
        return state[name].clone()

    put_weights(empty, read, "cpu")
    assert all(torch.equal(tensor, state[name]) for name, tensor in empty.state_dict().items())
    assert ties(empty) == ties(whole) and asked == [name for name, _ in whole.named_parameters()]
    learns = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in empty.named_parameters() if p.requires_grad}
    batch = replace(scene_batch(2), decoders=[])
    with torch.no_grad():
        ours, theirs = (model.eval()(batch)["lm"].total for model in (empty, whole))
    assert float(ours) == float(theirs)


def test_persistent_buffers_are_read_and_numbers_take_the_type_of_the_model():
    with on_meta():
        norm = nn.BatchNorm1d(3)
    given = {"weight": torch.ones(3).bfloat16() * 2, "bias": torch.zeros(3), "running_mean": torch.full((3,), 4.0),
             "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(7)}  # fmt: skip
    put_weights(norm, given.__getitem__, "cpu")
    assert norm.weight.dtype == torch.float32 and norm.weight.tolist() == [2, 2, 2]
    assert norm.running_mean.tolist() == [4, 4, 4] and int(norm.num_batches_tracked) == 7


def test_what_another_thread_builds_has_its_weights():
    built = []
    with on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not built[0].weight.is_meta and not nn.Linear(2, 2).weight.is_meta


def test_loading_needs_the_memory_of_the_weights_once(tmp_path):
    model = tiny_model(**LARGE)
    size = 4 * count_parameters(model) / (1 << 20)
    assert size > 100
    folder = save_model(tmp_path, model.state_dict(), tiny_settings(**LARGE), tiny_tokenizer(), ModelMeta("tiny"))
    del model
    with peak_of() as mebibytes:
        loaded = load_model(folder)
    assert mebibytes() < 1.2 * size
    assert count_parameters(loaded.model.trunk) > 0
    del loaded
    with peak_of() as mebibytes:
        load_model(folder, parts=["lumen"])
    assert mebibytes() < 0.2 * size
