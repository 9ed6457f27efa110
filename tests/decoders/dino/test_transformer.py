"""Grounding DINO's transformer: fresh weights, activation checkpointing, settings, and what its parts compute."""

from __future__ import annotations

import pytest
import torch
from support.gdino_tiny import random_link, random_pixels, targets_of, tiny_decoder
from support.tiny_models import scrambled
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoBiMultiHeadAttention,
    GroundingDinoMultiheadAttention,
    encode_sinusoidal_position_embedding,
)

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.common.boxes import inverse_sigmoid, to_cxcywh, to_xyxy
from lumen_ray.decoders.dino.decoder import LayerOutput
from lumen_ray.decoders.dino.layers import FusedAttention, FusedFusion
from lumen_ray.decoders.dino.settings import DinoSettings
from lumen_ray.decoders.dino.transformer import GroupNorm, cells, library_config, sines
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.errors import UserError
from lumen_ray.train.blocks import blocks


def test_a_fresh_decoder_starts_where_training_can_begin():
    decoder = tiny_decoder()
    trunk = decoder.trunk
    assert all(layer.weight.std() > 0.05 for layer in trunk.decoder.reference_points_head.layers)
    assert all(layer.weight.std() > 0.05 for layer in decoder.mask_embed.layers)
    for head in (decoder.bbox_embed, trunk.encoder_output_bbox_embed):  # boxes start where the proposals are
        assert not head.layers[-1].weight.any() and head.layers[0].weight.any()
    attention = trunk.encoder.layers[0].deformable_layer.self_attn
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
    ring = attention.sampling_offsets.bias.view(4, 4, 4, 2)  # heads, levels, points, xy
    assert torch.allclose(ring[:, 0].abs().amax(-1), torch.arange(1.0, 5.0).expand(4, 4))


def test_layers_that_are_computed_again_give_the_same_gradients():
    link, pixels = random_link([2, 3]), random_pixels([(64, 64), (48, 64)], (64, 64))
    targets = targets_of([[[4.0, 4.0, 40.0, 30.0]], [], [], [[10.0, 10.0, 30.0, 30.0]], []], side=64)
    grads = []
    for again in (False, True):
        decoder = scrambled(tiny_decoder(denoising_queries=8), std=0.05).train()
        names = []
        for name, block in blocks(decoder):
            names.append(name)
            if again:
                forward = block.forward
                block.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
        torch.manual_seed(0)
        sum(term.total for term in decoder.losses(link, pixels, targets).values()).backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    for part in ("trunk.backbone.swin.encoder.layers.0", "trunk.encoder.layers.0", "trunk.decoder.layers.1"):
        assert part in names
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4 * float(grad.abs().max()) + 1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_librarys(masked):
    config = library_config(DinoSettings(hidden_size=32, num_heads=4, encoder_ffn=64))
    torch.manual_seed(0)
    theirs, ours = GroundingDinoMultiheadAttention(config, 4), FusedAttention(config, 4)
    ours.load_state_dict(theirs.state_dict())
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    mask = mask_to_bias(torch.rand(2, 1, 5, 7) > 0.4, q.dtype) if masked else None
    torch.testing.assert_close(ours(q, k, v, mask)[0], theirs(q, k, v, mask)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_fused_fusion_is_the_librarys(masked):
    config = library_config(DinoSettings(hidden_size=32, num_heads=4, encoder_ffn=64))
    torch.manual_seed(0)
    theirs, ours = GroundingDinoBiMultiHeadAttention(config), FusedFusion(config)
    ours.load_state_dict(theirs.state_dict())
    vision, text = torch.randn(2, 9, 32), torch.randn(2, 4, 32)
    padding = (torch.rand(2, 9) < 0.4, torch.rand(2, 4) < 0.4) if masked else (None, None)
    added = [mask if mask is None else mask_to_bias(~mask, torch.float32)[:, None, None] for mask in padding]
    for one, other in zip(ours(vision, text, *added), theirs(vision, text, *padding), strict=True):
        torch.testing.assert_close(one[0], other[0])


def test_sines_are_the_librarys():
    values = torch.rand(2, 5, 4)
    wanted = encode_sinusoidal_position_embedding(values, 8)
    torch.testing.assert_close(sines(values[..., [1, 0, 2, 3]], 8), wanted, atol=1e-5, rtol=0)


def test_a_stage_first_read_without_gradients_still_learns():
    weight = torch.ones(1, requires_grad=True)
    whole = LayerOutput(
        torch.zeros(1, 3, 2), lambda: weight * torch.ones(1, 3, 2), lambda: weight * torch.ones(1, 3, 4)
    )
    first, rest = whole.split(1)
    with torch.no_grad():
        assert rest.logits.shape == (1, 2, 2) and first.boxes.shape == (1, 1, 4)
    assert rest.logits.requires_grad and whole.boxes.requires_grad
    with torch.no_grad():
        fixed = LayerOutput(whole.hidden, lambda: weight * 2, lambda: weight * 2)
    assert not fixed.logits.requires_grad


def test_group_norm_of_single_values_is_the_bias_and_of_others_torchs():
    norm = scrambled(GroupNorm(32), std=0.5)
    x = torch.randn(1, 32, 3, 2)
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, 32, norm.weight, norm.bias))
    single = norm(torch.randn(2, 32, 1, 1) * 1e4)
    assert torch.equal(single, norm.bias[:, None, None].expand(2, -1, -1, -1))


def test_boxes_there_and_back():
    boxes = torch.tensor([[1.0, 2.0, 5.0, 10.0]])
    assert to_cxcywh(boxes).tolist() == [[3, 6, 4, 8]] and torch.equal(to_xyxy(to_cxcywh(boxes)), boxes)
    x = torch.tensor([0.0, 1e-7, 0.2, 0.9, 1.0])
    back = inverse_sigmoid(x, 1e-5).sigmoid()
    torch.testing.assert_close(back, torch.tensor([0.0, 0.0, 0.2, 0.9, 1.0]), atol=2e-5, rtol=0)
    assert cells((65, 64), 8) == (9, 8)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"backbone": {"embed_dims": 16}}, "did you mean 'embed_dim'"),
        ({"hidden_size": 96, "num_heads": 10}, "hidden_size 96 must be a multiple of num_heads 10"),
        ({"encoder_ffn": 60}, "encoder_ffn 60 must be a multiple of num_heads 8"),
    ],
)
def test_invalid_settings_raise_user_errors(keys, why):
    with pytest.raises((UserError, ValueError), match=why):
        GroundingDinoSettings.model_validate(keys)
