"""Floating-point operations of the image decoders: UNet, VAE and text encoder, by torch's FLOP counter."""

from __future__ import annotations

import torch
from torch import Tensor

from lumen_ray.decoders.common.flops import DecoderWork, LibraryFlops, is_trainable, library_flops
from lumen_ray.decoders.diffusion.decoder import DiffusionDecoder
from lumen_ray.structures import Size


class DiffusionFlops:
    """Forward FLOPs of a decoder's modules, per image."""

    def __init__(self, counter: LibraryFlops):
        self.counter, self.decoder = counter, counter.module

    def _latents(self, size: Size, channels: int) -> Tensor:
        shrink = 2 ** (len(self.decoder.vae.config.block_out_channels) - 1)
        return torch.empty(1, channels, size[0] // shrink, size[1] // shrink)

    def unet(self, size: Size) -> float:
        """One UNet step for an image of (height, width) `size` pixels."""
        unet, tokens = self.decoder.unet, self.decoder.settings.num_tokens

        def run() -> None:
            condition = torch.empty(1, tokens, self.decoder.width)
            unet(self._latents(size, unet.config.in_channels), torch.zeros(1), encoder_hidden_states=condition)

        return self.counter.count(("unet", size), run)

    def encode(self, size: Size) -> float:
        """The VAE's encoder."""
        vae = self.decoder.vae
        return self.counter.count(("encode", size), lambda: vae.encode(torch.empty(1, 3, *size)))

    def decode(self, size: Size) -> float:
        """The VAE's decoder."""
        vae = self.decoder.vae
        latents = vae.config.latent_channels
        return self.counter.count(("decode", size), lambda: vae.decode(self._latents(size, latents)))

    def caption(self) -> float:
        """The text encoder, for one caption."""
        encoder = self.decoder.text_encoder
        ids = torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.int64, device="meta")
        return self.counter.count("caption", lambda: encoder(ids))


def count(decoder: DiffusionDecoder, work: DecoderWork) -> float:
    """FLOPs of a training step, forward and backward."""
    s, targets = decoder.settings, work.targets
    flops = DiffusionFlops(library_flops(decoder, work.build))
    sizes: list[Size] = [(height, width) for height, width in targets.extents.tolist()]
    encoded = sum(flops.encode(size) for size in sizes)
    total = decoder.latents_read * encoded  # the target, and the source image of an edit
    trained = is_trainable(decoder.unet)
    total += sum(flops.unet(size) for size in sizes) * (1 + (work.needs_input_grad or trained) + trained)
    if is_trainable(decoder.vae):
        share = min(1.0, s.vae_images / len(sizes))
        total += 3 * share * (encoded + sum(flops.decode(size) for size in sizes))
    if decoder.text_encoder is not None:
        total += flops.caption() * (1 + (0 if targets.caption_ids is None else len(targets.caption_ids)))
    return total
