"""Decoders that make pictures: `diffusers`' latent diffusion (arXiv 2112.10752), conditioned by 64 link states."""

from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings, StableDiffusionSettings
from lumen_ray.decoders.spec import DecoderSpec

STABLE_DIFFUSION = DecoderSpec(
    name="stable_diffusion",
    family="generation",
    tasks=("generate",),
    reads=None,
    losses={"generate": "batches", "generate_align": "batches", "generate_vae": "batches"},
    settings=StableDiffusionSettings,
    decoder="lumen_ray.decoders.diffusion.stable_diffusion:StableDiffusionDecoder",
    link_head="lumen_ray.decoders.diffusion.link_head:link_head",
    flops="lumen_ray.decoders.diffusion.flops:count",
    published="lumen_ray.decoders.diffusion.published:LOADER",
    released="lumen_ray.decoders.diffusion.released:STABLE_DIFFUSION",
    description="generates pictures",
)

INSTRUCT_PIX2PIX = DecoderSpec(
    name="instruct_pix2pix",
    family="editing",
    tasks=("edit",),
    reads="pixels",
    losses={"edit": "batches", "edit_align": "batches", "edit_vae": "batches"},
    settings=InstructPix2PixSettings,
    decoder="lumen_ray.decoders.diffusion.instruct_pix2pix:InstructPix2PixDecoder",
    link_head="lumen_ray.decoders.diffusion.link_head:link_head",
    flops="lumen_ray.decoders.diffusion.flops:count",
    published="lumen_ray.decoders.diffusion.published:LOADER",
    released="lumen_ray.decoders.diffusion.released:INSTRUCT_PIX2PIX",
    description="edits pictures",
)
