"""Tiny diffusion decoders, and links and pictures for them."""

import torch

from lumen_ray.decoders.diffusion.instruct_pix2pix import InstructPix2PixDecoder
from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings, StableDiffusionSettings
from lumen_ray.decoders.diffusion.stable_diffusion import StableDiffusionDecoder
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import ImageTargets, Pixels

WIDTH, TOKENS, SIDE = 16, 6, 16

UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
BASE = {"image_size": SIDE, "max_image_size": 64, "vae": VAE, "num_tokens": TOKENS, "mapper_heads": 2}


def stable_diffusion(seed=0, **keys):
    torch.manual_seed(seed)
    return StableDiffusionDecoder(StableDiffusionSettings(**{**BASE, "unet": UNET, **keys}))


def instruct_pix2pix(seed=0, **keys):
    torch.manual_seed(seed)
    unet = {**UNET, "in_channels": 8}
    return InstructPix2PixDecoder(InstructPix2PixSettings(**{**BASE, "unet": unet, **keys}))


def make_link(number=3, seed=1, images=2):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(number, TOKENS, WIDTH, generator=generator)
    return SuperLink("x", embeddings, torch.arange(number) % images, torch.full((number,), -1))


def make_pixels(number=2, side=24, seed=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 3, side, side), generator=generator, dtype=torch.uint8)
    return Pixels(images, torch.tensor([[side, side - 8]] * number))


def make_targets(number=3, side=SIDE, seed=3, **values):
    return ImageTargets(make_pixels(number, side, seed).images, **values)
