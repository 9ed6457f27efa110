"""In a decoding step linear layers give what they give elsewhere, also after their weights have changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lumen_ray.trunk import step_linear
from lumen_ray.trunk.step_linear import MOST_ROWS, StepLinear, decoding_rows, use_step_linears


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(step_linear, "LEAST_WEIGHTS", 0)


@pytest.fixture
def calls(monkeypatch):
    """The number of packed products."""
    counted = []
    weights = StepLinear._weights
    monkeypatch.setattr(StepLinear, "_weights", lambda self: counted.append(1) or weights(self))
    return counted


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (3, 24), (2, 2, 24), (1, MOST_ROWS, 24), (24,)])
def test_the_product_is_that_of_a_plain_layer(shape, bias, calls):
    torch.manual_seed(0)
    plain, layer = nn.Linear(24, 40, bias), nn.Linear(24, 40, bias)
    layer.load_state_dict(plain.state_dict())
    use_step_linears(layer)
    x = torch.randn(shape)
    with torch.inference_mode(), decoding_rows():
        torch.testing.assert_close(layer(x), plain(x))
        assert layer(x).shape == plain(x).shape and len(calls) == 2
    with torch.no_grad():
        for p in (plain.weight, layer.weight):
            p.mul_(2)
    with torch.inference_mode(), decoding_rows():
        torch.testing.assert_close(layer(x), plain(x))
    # elsewhere it is the plain layer
    layer(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert len(calls) == 3


def test_gradients_autocast_and_many_rows_take_the_plain_product(calls):
    layer = nn.Linear(8, 8)
    use_step_linears(layer)
    with decoding_rows():
        layer(torch.randn(2, 8)).sum().backward()
        with torch.inference_mode():
            layer(torch.randn(MOST_ROWS + 1, 8))
            assert layer(torch.randn(0, 8)).shape == (0, 8)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    with torch.inference_mode():
        layer(torch.randn(2, 8))
    assert not calls


def test_only_plain_layers_change_and_only_small_models(monkeypatch):
    class Other(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(2, 3), Other(3, 2), nn.LayerNorm(2))
    before = module.state_dict().keys()
    with monkeypatch.context() as patched:
        patched.setattr(step_linear, "MOST_BYTES", 8)
        use_step_linears(module)
    assert type(module[0]) is nn.Linear
    with monkeypatch.context() as patched:
        patched.setattr(step_linear, "LEAST_WEIGHTS", 7)
        use_step_linears(module)
    assert type(module[0]) is nn.Linear
    use_step_linears(module)
    use_step_linears(module)
    assert [type(layer) for layer in module] == [StepLinear, Other, nn.LayerNorm]
    assert module.state_dict().keys() == before


def test_a_layer_can_be_copied_and_pickled():
    layer = nn.Linear(4, 4)
    use_step_linears(layer)
    with torch.inference_mode(), decoding_rows():
        expected = layer(torch.ones(1, 4))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(torch.ones(1, 4)), expected)
