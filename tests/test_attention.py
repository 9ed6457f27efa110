import torch

from lumen_ray.attention import mask_to_bias


def test_a_bias_is_zero_where_attention_is_allowed_and_finite_elsewhere():
    bias = mask_to_bias(torch.tensor([[[True, False], [False, False]]]), torch.float32)
    least = torch.finfo(torch.float32).min
    assert bias.tolist() == [[[0, least], [least, least]]]
    assert torch.softmax(bias, -1).tolist() == [[[1, 0], [0.5, 0.5]]]


def test_the_bias_has_the_dtype_of_the_logits():
    bias = mask_to_bias(torch.tensor([False]), torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.isfinite().all()
