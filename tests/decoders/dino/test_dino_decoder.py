"""A training step on chunks of groups gives the same losses and gradients as one on all groups at once."""

import pytest
import torch
from support import gdino_tiny, unipose_tiny
from support.gdino_tiny import random_link, random_pixels, targets_of
from support.tiny_models import scrambled

from lumen_ray.decoders.dino import decoder as dino_decoder

#: requests about one image are groups of it, and images differ in size
EXTENTS, SIZE = [(64, 96), (96, 80), (48, 48)], (96, 96)
BOXES = [
    [[8, 8, 40, 40]],
    [],
    [[20, 8, 60, 44], [4, 30, 30, 60]],
    [[10, 10, 70, 60]],
    [[5, 5, 30, 30]],
    [[8, 4, 40, 36]],
]


def detection(**changes):
    settings = {"mask_points": 64, "num_queries": 10, **changes}
    link = random_link([1, 2, 1, 2], images=[0, 1, 1, 2])
    return (
        scrambled(gdino_tiny.tiny_decoder(**settings), std=0.05).train(),
        link,
        random_pixels(EXTENTS, SIZE),
        targets_of(BOXES, masks="denoising_queries" not in changes),  # points of masks are drawn
    )


def poses(**changes):
    link, pixels, targets = unipose_tiny.figures([192, 195, 192], 96)
    return scrambled(unipose_tiny.tiny_decoder(**changes), std=0.05).train(), link, pixels, targets


def step(make, pixels_at_once, **changes):
    """Losses, gradients by name and with them that of the links, and the number of groups in each pass."""
    decoder, link, pixels, targets = make(pixels_at_once=pixels_at_once, **changes)
    link.embeddings = link.embeddings.clone().requires_grad_()
    passes, look = [], decoder._decode
    decoder._decode = lambda link, levels, groups, *rest: (
        passes.append(len(groups.image)),
        look(link, levels, groups, *rest),
    )[1]
    torch.manual_seed(4)
    losses = decoder.losses(link, pixels, targets)
    forward = list(passes)
    sum(term.total for term in losses.values()).backward()
    grads = {name: p.grad for name, p in decoder.named_parameters()} | {"links": link.embeddings.grad}
    return losses, grads, forward, passes[len(forward) :]


@pytest.mark.parametrize("make", [detection, poses])
def test_parts_add_up_to_the_whole(make):
    """Without what is drawn at random: of parts, other numbers are drawn."""
    exact, whole, once, again = step(make, 1 << 20, denoising_queries=0)
    assert len(once) == 1 and not again
    largest = 96 * 96  # which all maps are padded to
    for most in (1, 2 * largest):
        losses, grads, forward, again = step(make, most, denoising_queries=0)
        assert max(forward) == max(1, most // largest) and sum(forward) == once[0] and len(forward) > 1
        assert sorted(again) == sorted(forward)  # activations are computed again, not kept
        for name, term in exact.items():
            torch.testing.assert_close(losses[name].total, term.total, atol=1e-4, rtol=1e-4)
            assert losses[name].count == term.count
            assert (term.each is None) == (losses[name].each is None)
            if term.each is not None:
                torch.testing.assert_close(losses[name].each, term.each, atol=1e-4, rtol=1e-4)
        for name, grad in whole.items():
            torch.testing.assert_close(grads[name], grad, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("make", [detection, poses])
def test_recomputation_equals_the_first_pass(make, monkeypatch):
    """Noise, masks' points and dropout included."""
    losses, grads, *_ = step(make, 1, dropout=0.1)
    places = []

    def checkpoint(run, *args, use_reentrant):
        places.append([arg for arg in args if isinstance(arg, torch.Tensor)])
        return run(*args)

    monkeypatch.setattr(dino_decoder, "checkpoint", checkpoint)
    kept, expected, *_ = step(make, 1, dropout=0.1)
    assert places and all(places)  # which say whose random numbers torch is to keep
    assert all(torch.equal(losses[name].total, term.total) for name, term in kept.items())
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)
