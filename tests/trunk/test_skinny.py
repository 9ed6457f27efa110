"""Linear layers give the same for few rows as for many, with and without gradients."""

import pytest
import torch
from torch import nn

from lumen_ray.trunk.skinny import MOST_ROWS, SkinnyLinear, use_skinny_linears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (3, 24), (2, 2, 24), (1, MOST_ROWS + 1, 24), (0, 24), (24,)])
def test_the_product_is_that_of_a_plain_layer(shape, bias):
    torch.manual_seed(0)
    plain, skinny = nn.Linear(24, 40, bias), nn.Linear(24, 40, bias)
    skinny.load_state_dict(plain.state_dict())
    use_skinny_linears(skinny)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(skinny(x), plain(x))
        assert skinny(x).is_contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            assert skinny(x).dtype == torch.bfloat16
    skinny(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(skinny.weight.grad, plain.weight.grad)


def test_only_plain_layers_change():
    class Other(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(2, 3), Other(3, 2), nn.LayerNorm(2))
    before = module.state_dict().keys()
    use_skinny_linears(module)
    assert [type(layer) for layer in module] == [SkinnyLinear, Other, nn.LayerNorm]
    assert module.state_dict().keys() == before
