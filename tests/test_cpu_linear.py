"""Linear layers by oneDNN give what plain ones give, forwards and backwards, also after their weights have changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lumen_ray import cpu_linear
from lumen_ray.cpu_linear import MOST_PACKED_ROWS, CpuLinear, pack, packed_weights, use_onednn


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LEAST_WORK", 0)
    monkeypatch.setattr(cpu_linear, "LEAST_PACKED_WEIGHTS", 0)


@pytest.fixture
def calls(monkeypatch):
    """Of each product, whether its weights were packed."""
    made, product = [], cpu_linear._product

    def counted(rows, weight, bias=None):
        made.append(weight.layout == torch._mkldnn)
        return product(rows, weight, bias)

    monkeypatch.setattr(cpu_linear, "_product", counted)
    return made


def _pair(inputs=24, outputs=40, bias=True):
    torch.manual_seed(0)
    plain, layer = nn.Linear(inputs, outputs, bias), nn.Linear(inputs, outputs, bias)
    layer.load_state_dict(plain.state_dict())
    use_onednn(layer)
    pack(layer)
    return plain, layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (3, 24), (2, 2, 24), (1, MOST_PACKED_ROWS, 24), (24,)])
def test_the_product_is_that_of_a_plain_layer(shape, bias, calls):
    plain, layer = _pair(bias=bias)
    x = torch.randn(shape)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), plain(x))
            with packed_weights():
                torch.testing.assert_close(layer(x), plain(x))
                assert layer(x).shape == plain(x).shape
        with torch.no_grad():
            for p in (plain.weight, layer.weight):
                p.mul_(2)
    assert calls == [False, True, True] * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "weights", "input", "all but the bias"])
def test_gradients_are_those_of_a_plain_layer(frozen, bias, calls):
    plain, layer = _pair(bias=bias)
    found = []
    for module in (plain, layer):
        module.weight.requires_grad_(frozen not in ("weights", "all but the bias"))
        x = torch.linspace(-1, 1, 2 * 3 * 24).view(3, 2, 24).transpose(0, 1)  # not contiguous
        x.requires_grad_(frozen not in ("input", "all but the bias"))
        if frozen == "all but the bias" and not bias:
            continue
        with packed_weights():  # not where gradients are needed
            out = module(x)
        out.square().sum().backward()
        (module(x) * torch.ones(1)).sum().backward()  # a gradient without strides
        found.append([out, x.grad, module.weight.grad, module.bias.grad if bias else None])
    for expected, value in zip(*found, strict=True) if found else ():
        if expected is None:
            assert value is None
        else:
            torch.testing.assert_close(value, expected)
    assert bool(calls) == bool(found) and not any(calls)


def test_gradients_of_gradients_are_refused():
    _, layer = _pair()
    x = torch.randn(3, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_weights_that_are_replaced_are_packed_again(calls):
    _, layer = _pair(bias=False)
    x = torch.randn(2, 24)
    for number in range(5):
        layer.weight = nn.Parameter(torch.full((40, 24), float(number)))
        with torch.inference_mode(), packed_weights():
            with packed_weights():
                layer(x)
            torch.testing.assert_close(layer(x), x @ layer.weight.t())
    assert calls == [True] * 10


def test_second_pass_of_a_checkpoint_gives_the_same_gradients():
    plain, layer = _pair()
    x = torch.randn(5, 24)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_autocast_other_types_empty_input_and_small_products_are_left_to_torch(calls, monkeypatch):
    _, layer = _pair(8, 8)
    with torch.inference_mode(), packed_weights():
        assert layer(torch.randn(0, 8)).shape == (0, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
        assert copy.deepcopy(layer).double()(torch.randn(2, 8).double()).dtype == torch.float64
    with torch.device("meta"):
        on_meta = nn.Linear(8, 8)
        use_onednn(on_meta)
        assert on_meta(torch.randn(2, 8)).shape == (2, 8)
    monkeypatch.setattr(cpu_linear, "LEAST_WORK", 1 << 20)
    layer(torch.randn(2, 8)).sum().backward()
    assert not calls


def test_many_rows_are_not_multiplied_with_packed_weights(calls):
    _, layer = _pair(8, 8)
    with torch.inference_mode(), packed_weights():
        layer(torch.randn(MOST_PACKED_ROWS + 1, 8))
    assert calls == [False]


def test_only_plain_layers_change_and_only_small_models_are_packed(monkeypatch):
    class Other(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(2, 3), Other(3, 2), nn.LayerNorm(2))
    before = module.state_dict().keys()
    for _ in range(2):
        use_onednn(module)
    assert [type(layer) for layer in module] == [CpuLinear, Other, nn.LayerNorm]
    assert module.state_dict().keys() == before
    with monkeypatch.context() as patched:
        patched.setattr(cpu_linear, "MOST_PACKED_BYTES", 8)
        pack(module)
    assert not module[0].packs
    with monkeypatch.context() as patched:
        patched.setattr(cpu_linear, "LEAST_PACKED_WEIGHTS", 7)
        pack(module)
    assert not module[0].packs
    pack(module)
    assert module[0].packs


def test_a_layer_can_be_copied_and_pickled():
    _, layer = _pair(4, 4)
    with torch.inference_mode(), packed_weights():
        expected = layer(torch.ones(1, 4))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(torch.ones(1, 4)), expected)
