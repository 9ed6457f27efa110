"""Both image decoders, including the VAE, learn from scratch to follow their links."""

import pytest
import torch
from support.diffusion_fakes import SIDE, TOKENS, UNET, VAE, WIDTH, instruct_pix2pix, stable_diffusion

from lumen_ray.decoders.base import SampleSettings
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, Pixels

pytestmark = pytest.mark.slow
COLOURS = torch.tensor([[230, 20, 20], [20, 20, 230], [30, 200, 30]], dtype=torch.uint8)
KEYS = {
    "unet": {**UNET, "block_out_channels": [16, 32]},
    "vae": {**VAE, "scaling_factor": 0.5},
    "train_unet": True,
    "train_vae": True,
    "vae_images": 8,
    "vae_kl_weight": 1e-4,
}


def link_of(words, which):
    index = torch.arange(len(which))
    return SuperLink("x", words[which], index, torch.full_like(index, -1))


def plain(which):
    """Pictures of one colour, uint8 [N, 3, SIDE, SIDE]."""
    return COLOURS[which][:, :, None, None].expand(-1, -1, SIDE, SIDE).contiguous()


def train(decoder, steps, batch):
    torch.manual_seed(0)
    words = torch.nn.Parameter(torch.randn(3, TOKENS, WIDTH))
    optimizer = torch.optim.AdamW([*decoder.parameters(), words], lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        link, view, targets = batch(words)
        losses = decoder.losses(link, view, targets)
        loss = sum(term.total / term.count for term in losses.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    decoder.eval()
    return words.detach()


def nearest(pictures):
    """Index of the colour that the mean of each picture is nearest to."""
    return (pictures.float().mean((2, 3))[:, None] - COLOURS.float()).norm(dim=-1).argmin(1)


def test_text_to_image_generates_the_colour_of_the_prompt():
    decoder = stable_diffusion(**KEYS)

    def batch(words):
        which = torch.randint(3, (16,))
        view = Pixels(torch.zeros(16, 3, SIDE, SIDE, dtype=torch.uint8), torch.full((16, 2), SIDE))
        return link_of(words, which), view, ImageTargets(plain(which))

    words = train(decoder, 1000, batch)
    which = torch.arange(12) % 3
    _, view, _ = batch(words)
    drawn = decoder.sample(link_of(words, which), view, SampleSettings(steps=20, guidance=2.0, num_images=2))
    assert torch.equal(nearest(drawn), which.repeat_interleave(2))


def test_edits_start_from_the_source_image_and_follow_the_instruction():
    """Instruction 0 leaves the picture, 1 paints it in the first colour, 2 in the second."""
    decoder = instruct_pix2pix(**{**KEYS, "unet": {**KEYS["unet"], "in_channels": 8}})

    def after(which, start):
        return torch.where(which == 0, start, which - 1)

    def batch(words, number=16):
        which, start = torch.randint(3, (number,)), torch.randint(3, (number,))
        view = Pixels(plain(start), torch.full((number, 2), SIDE))
        return link_of(words, which), view, ImageTargets(plain(after(which, start)))

    words = train(decoder, 1000, batch)
    which, start = torch.arange(9) % 3, torch.arange(9) // 3
    view = Pixels(plain(start), torch.full((9, 2), SIDE))
    drawn = decoder.sample(link_of(words, which), view, SampleSettings(steps=20, guidance=2.0, image_guidance=1.2))
    assert (nearest(drawn) == after(which, start)).sum() >= 7  # of 9, where 3 come by chance
